"""What importing the package pulls in, and what each room may import from outside."""

import subprocess
import sys
from pathlib import Path

import grimp
import pytest

ROOT = Path(__file__).parent.parent

# Third-party packages each room may import, anywhere in it, even inside a function. `None`: a leaf, free to choose.
ALLOWED = {
    "core": {"torch", "greenlet"},
    "models": {"torch", "greenlet", "diffusers", "transformers", "safetensors"},
    "pipeline": {
        "torch",
        "diffusers",
        "huggingface_hub",
        "numpy",
        "PIL",
    },  # the last two: what pictures are in diffusers
    "loading": {"torch", "diffusers", "transformers", "safetensors", "torchao"},  # the last for a quantiser alone
    "world": {"numpy", "scipy"},
    "evaluation": {"torch", "numpy"},
    "evaluation_strip": {"torch", "numpy"},
    "picture": {"numpy", "PIL"},
    "appearing": {"PIL"},
    "recording": {"PIL"},
    "serve": {"torch", "PIL", "fastapi", "starlette", "pydantic", "prometheus_client"},
    "comfy": {
        *("torch", "numpy", "PIL", "tqdm", "einops", "transformers"),  # ComfyUI brings these itself
        *("diffusers", "huggingface_hub"),  # for a model in diffusers' layout alone
        *("comfy", "comfy_execution", "comfy_extras", "folder_paths", "latent_preview", "node_helpers", "nodes"),
    },
    "train": None,
    "defaults": set(),
    "cli": None,
}


def modules_after(statement: str) -> set[str]:
    """Top-level modules that a fresh interpreter holds after `statement`."""
    code = f"{statement}\nimport sys\nprint(*{{name.partition('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    return set(done.stdout.split())


def test_importing_the_package_pulls_in_nothing_heavy():
    loaded = modules_after("import rolling_diffusion; dir(rolling_diffusion)")
    assert "rolling_diffusion" in loaded
    assert not loaded & {"torch", "numpy", "PIL", "scipy", "comfy", "diffusers", "transformers"}


def test_plans_and_defaults_need_no_torch():
    loaded = modules_after("import rolling_diffusion; rolling_diffusion.plan_for, rolling_diffusion.Card")
    assert "rolling_diffusion" in loaded and not loaded & {"torch", "numpy", "diffusers", "transformers"}


def test_the_program_starts_without_torch():
    loaded = modules_after("import rolling_diffusion.cli.main")
    assert "rolling_diffusion" in loaded and not loaded & {"torch", "numpy", "diffusers", "transformers"}


def test_the_core_pulls_in_neither_diffusers_nor_a_host():
    loaded = modules_after("import rolling_diffusion.core")
    assert not loaded & {"comfy", "diffusers", "transformers"}


def test_every_public_name_is_there():
    import rolling_diffusion

    for name in rolling_diffusion.__all__:
        assert getattr(rolling_diffusion, name) is not None
        assert name in dir(rolling_diffusion)
    assert rolling_diffusion.make_plan(8, 8, 4, window=4, overlap=2).blocks[0] == rolling_diffusion.Block(0, 0, 0, 2, 8)


def test_unknown_public_name_is_an_attribute_error():
    import rolling_diffusion

    with pytest.raises(AttributeError, match="no attribute 'Plann'"):
        rolling_diffusion.Plann  # noqa: B018


def test_each_room_imports_only_its_own_libraries():
    graph = grimp.build_graph("rolling_diffusion", include_external_packages=True, exclude_type_checking_imports=True)
    rooms = {child.rpartition(".")[2] for child in graph.find_children("rolling_diffusion")}
    assert rooms <= ALLOWED.keys(), "a room without a row in ALLOWED"
    for room in rooms:
        allowed = ALLOWED[room]
        for module in {f"rolling_diffusion.{room}"} | graph.find_descendants(f"rolling_diffusion.{room}"):
            outside = set(graph.find_modules_directly_imported_by(module))
            outside = {name.partition(".")[0] for name in outside} - {"rolling_diffusion"} - sys.stdlib_module_names
            assert allowed is None or outside <= allowed, f"{module} imports {sorted(outside - allowed)}"
