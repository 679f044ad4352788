"""Fixtures for every room."""

import importlib
import importlib.util
import sys
import types

import pytest
from hypothesis import HealthCheck, settings

# The same examples on every machine, however slow: a tree that passes here passes there.
settings.register_profile("house", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("house")


@pytest.fixture(scope="session")
def k_sampling():
    """The real k_diffusion.sampling, unmodified, without what its package drags in.

    The package's own __init__ imports training code (accelerate, clip, …) that no sampler needs: so it is put in place
    unrun, and Python finds `sampling` and `utils` in it as usual. utils names torchvision for its image loaders, which
    are not used either: where it is missing, an empty module stands in while the import lasts, and no longer.
    """
    spec = importlib.util.find_spec("k_diffusion")
    assert spec is not None, "the k-diffusion wheel is missing: make install"
    stubs = {}
    if importlib.util.find_spec("torchvision") is None:
        stubs = {name: types.ModuleType(name) for name in ("torchvision", "torchvision.transforms")}
        stubs["torchvision.transforms"].functional = None  # pyright: ignore[reportAttributeAccessIssue]
    sys.modules.update(stubs)
    sys.modules["k_diffusion"] = importlib.util.module_from_spec(spec)
    try:
        return importlib.import_module("k_diffusion.sampling")
    finally:
        for name in stubs:
            del sys.modules[name]


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """`rolling-diffusion serve` with the embedded model, without a key and without files."""
    for name in ("fastapi", "uvicorn", "prometheus_client", "python_multipart", "openai", "httpx", "diffusers"):
        pytest.importorskip(name)
    from own_serve import Server

    started = Server(tmp_path_factory.mktemp("serve"), "--device", "cpu")
    yield started
    started.stop()


@pytest.fixture(scope="session")
def rolled():
    """The embedded model in this process."""
    pytest.importorskip("diffusers")
    from rolling_diffusion import load, roll
    from rolling_diffusion.cli.model import EMBEDDED_FOLDER

    pipe = load(EMBEDDED_FOLDER, device="cpu")
    pipe.set_progress_bar_config(disable=True)
    return roll(pipe)
