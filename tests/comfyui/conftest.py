"""A real ComfyUI in this process: COMFYUI_PATH names the checkout, and this interpreter has its requirements."""

import asyncio
import os
import sys
from pathlib import Path

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
    sys.argv = ["main.py", "--cpu", "--base-directory", str(base), "--disable-api-nodes",
                "--preview-method", "latent2rgb", "--use-pytorch-cross-attention"]  # fmt: skip
    sys.path.insert(0, COMFYUI)
    os.chdir(COMFYUI)
    import comfy.options

    comfy.options.enable_args_parsing()
    import utils.extra_config  # noqa: F401  before nodes, or utils is found elsewhere

    # isort: split
    import nodes

    asyncio.run(nodes.init_builtin_extra_nodes())
    loaded = asyncio.run(nodes.load_custom_node(str(PACK)))
    assert loaded, "ComfyUI's loader could not import the pack; its traceback is in the log above"
    sys.path.insert(0, str(Path(__file__).parent))
    import tiny_models

    return Host(nodes.NODE_CLASS_MAPPINGS, tiny_models, base)


class Host:
    """Nodes, tiny models, and short ways to run KSampler and ours with the same arguments."""

    def __init__(self, nodes, tiny, base):
        self.nodes, self.tiny, self.base, self.pack, self.comfyui = nodes, tiny, base, PACK, Path(COMFYUI)
        self.prompts = tiny.conditioning(1), tiny.conditioning(2)
        module = nodes["AutoregressiveRollingDiffusionSampler"].__module__
        self.room = module.rsplit(".", 1)[0]  # the pack's package, as ComfyUI's loader named it

    def module(self, name):
        """A module of the pack's comfy room, or of another, such as "core.plan"."""
        inside = f"{self.room}.{name}"
        return sys.modules[inside if inside in sys.modules else f"{self.room.rsplit('.', 1)[0]}.{name}"]

    def stock(self, model, latent, sampler="euler", scheduler="simple", steps=3, denoise=1.0, cfg=3.0, prompts=None):
        positive, negative = prompts or self.prompts
        run = self.nodes["KSampler"]().sample
        return run(model, 5, steps, cfg, sampler, scheduler, positive, negative, latent, denoise)[0]["samples"]

    def ours(self, model, latent, sampler="euler", scheduler="simple", steps=3, denoise=1.0, cfg=3.0, prompts=None,
             order="top-to-bottom", window=64, overlap=16, persistence=0.5, **extras):  # fmt: skip
        positive, negative = prompts or self.prompts
        run = self.nodes["AutoregressiveRollingDiffusionSampler"]().sample
        return run(model, positive, negative, latent, 5, steps, cfg, sampler, scheduler, denoise, order, window,
                   overlap, persistence, **extras)[0]["samples"]  # fmt: skip

    def run(self, name, **inputs):
        """Any node's outputs, V1 or V3."""
        node = self.nodes[name]
        out = node.execute(**inputs) if hasattr(node, "execute") else getattr(node(), node.FUNCTION)(**inputs)
        return getattr(out, "result", out)

    def calls(self, model):
        """The model, counting its calls, and the list they are counted in: (height, width, sigma) of each."""
        seen = []

        def wrapper(apply, args):
            seen.append((*args["input"].shape[-2:], float(args["timestep"].flatten()[0])))
            return apply(args["input"], args["timestep"], **args["c"])

        model = model.clone()
        model.set_model_unet_function_wrapper(wrapper)
        return model, seen


@pytest.fixture(autouse=True)
def inference():
    """ComfyUI runs nodes in inference mode."""
    import torch

    with torch.inference_mode():
        yield
