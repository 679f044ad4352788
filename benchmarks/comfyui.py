"""The node against KSampler in a real ComfyUI: one block, the embedded model, pairs interleaved in one run.

COMFYUI_PATH=/path/to/ComfyUI python -m benchmarks.comfyui        (or make bench-comfyui COMFYUI_PATH=…)
"""

from __future__ import annotations

import asyncio
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from . import ratios

PACK = Path(__file__).resolve().parents[1]
SIDE, STEPS, PAIRS = 256, 10, 60


def start(comfyui: str) -> dict[str, Any]:
    """ComfyUI in this process, with the pack loaded by its own loader: its node classes by name."""
    sys.argv = ["main.py", "--cpu", "--base-directory", tempfile.mkdtemp(), "--disable-api-nodes"]
    sys.path.insert(0, comfyui)
    os.chdir(comfyui)
    import comfy.options  # pyright: ignore[reportMissingImports]

    comfy.options.enable_args_parsing()
    import utils.extra_config  # noqa: F401  # pyright: ignore[reportMissingImports]

    # isort: split
    import nodes  # pyright: ignore[reportMissingImports]

    if not asyncio.run(nodes.load_custom_node(str(PACK))):
        raise SystemExit("ComfyUI's loader could not import the pack; its traceback is above")
    return nodes.NODE_CLASS_MAPPINGS


def main() -> int:
    comfyui = os.environ.get("COMFYUI_PATH", "")
    if not (Path(comfyui) / "main.py").is_file():
        print("COMFYUI_PATH must name a ComfyUI checkout: make bench-comfyui COMFYUI_PATH=/path/to/ComfyUI")
        return 2
    nodes = start(comfyui)
    import torch

    with torch.inference_mode():
        model, clip, _ = nodes["LoadEmbeddedRollingModel"]().load()
        prompt = nodes["CLIPTextEncode"]().encode(clip, "a red house left of a green tree")[0]
        latent = {"samples": torch.zeros(1, 16, SIDE // 8, SIDE // 8)}

        def stock() -> Any:
            return nodes["KSampler"]().sample(model, 1, STEPS, 1.0, "euler", "simple", prompt, prompt, latent, 1.0)[0]

        def ours() -> Any:
            run = nodes["AutoregressiveRollingDiffusionSampler"]().sample
            return run(
                model, prompt, prompt, latent, 1, STEPS, 1.0, "euler", "simple", 1.0, "top-to-bottom", 64, 16, 0.5
            )[0]

        if not torch.equal(stock()["samples"], ours()["samples"]):
            raise SystemExit("the two latents differ: there is nothing to compare")
        middle, every = ratios(ours, stock, PAIRS)
    print(
        f"One block of {SIDE}×{SIDE} pixels, {STEPS} Euler steps, the same latent bit for bit: the node "
        f"takes {middle:.3f} of KSampler's time, the median of {PAIRS} interleaved pairs "
        f"(quartiles {every[PAIRS // 4]:.3f} and {every[-PAIRS // 4]:.3f}; target: below 1.02)."
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
