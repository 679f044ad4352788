"""A real ComfyUI in this process: COMFYUI_PATH names the checkout, and this interpreter has its requirements."""

import asyncio
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

PACK = Path(__file__).resolve().parents[2]
COMFYUI = os.environ.get("COMFYUI_PATH", "")
SKIP = "COMFYUI_PATH is not set: make test-comfyui COMFYUI_PATH=/path/to/ComfyUI runs these tests in a real ComfyUI."


@pytest.fixture(scope="session")
def host(tmp_path_factory):
    """ComfyUI with the pack loaded by its own loader, and helpers to build tiny models and run nodes."""
    if not COMFYUI:
        pytest.skip(SKIP)
    base = tmp_path_factory.mktemp("comfyui")
    sys.argv = ["main.py", "--cpu", "--base-directory", str(base), "--disable-api-nodes", "--preview-method", "latent2rgb"]
    sys.path.insert(0, COMFYUI)
    os.chdir(COMFYUI)
    import comfy.options

    comfy.options.enable_args_parsing()
    import utils.extra_config  # noqa: F401  before nodes, or utils is found elsewhere
    import nodes

    asyncio.run(nodes.init_external_custom_nodes() if False else nodes.init_builtin_extra_nodes())
    loaded = asyncio.run(nodes.load_custom_node(str(PACK)))
    assert loaded, "ComfyUI's loader could not import the pack; its traceback is in the log above"
    import tiny_models

    return SimpleNamespace(nodes=nodes.NODE_CLASS_MAPPINGS, tiny=tiny_models, base=base, pack=PACK, comfyui=Path(COMFYUI))
