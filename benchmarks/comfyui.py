"""The node against KSampler in a real ComfyUI, on the embedded model.

COMFYUI_PATH=/path/to/ComfyUI python -m benchmarks.comfyui        (or make bench-comfyui COMFYUI_PATH=…)
    one block: pairs interleaved in one run; then rolling on a tall canvas, by the time on the CPU
COMFYUI_PATH=/path/to/ComfyUI python -m benchmarks.comfyui --windows [--prompts 60] [--bf16] [--results FILE]
    the model made to run in windows, as every model but Flux does: score, and time, on the same prompts and seeds.
    Stopped and started again, it goes on where FILE ends.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from . import ratios

PACK = Path(__file__).resolve().parents[1]
SIDE, STEPS, PAIRS = 256, 10, 60
TALL, TALL_ROLLED = 768, ("top-to-bottom", 48, 16)  # pixels; order, window and overlap in cells


def start(comfyui: str, *options: str) -> dict[str, Any]:
    """ComfyUI in this process, with the pack loaded by its own loader: its node classes by name."""
    sys.argv = ["main.py", "--cpu", "--base-directory", tempfile.mkdtemp(), "--disable-api-nodes", *options]
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


# Canvas in pixels (width, height), order, window and overlap in cells.
CANVASES = ((256, 768, "top-to-bottom", 48, 16), (512, 256, "left-to-right", 32, 16))
WINDOWED_STEPS, CFG, SEED = 20, 2.5, 1_000_000


class Windows:
    """KSampler and the node on the embedded model, which is denied its noise level per block."""

    def __init__(self, nodes: dict[str, Any], pictures: Path | None, dtype: str):
        self.nodes, self.pictures, self.dtype = nodes, pictures, dtype
        package = nodes["AutoregressiveRollingDiffusionSampler"].__module__.rpartition(".")[0]
        sampler = sys.modules[f"{package}.sampler"]
        sampler.per_block_noise = lambda *_: (False, "This benchmark takes one noise level a call")  # pyright: ignore[reportAttributeAccessIssue]
        self.model, self.clip, self.vae = nodes["LoadEmbeddedRollingModel"]().load()

    def one(self, canvas: tuple, index: int, prompt: Any, way: str) -> dict[str, Any]:
        """A picture's verdict, the seconds of CPU that sampling it took, and the mean colours of its rows of cells."""
        import numpy
        import torch

        from rolling_diffusion.world.score import judge

        width, height, order, window, overlap = canvas
        positive, negative = (self.nodes["CLIPTextEncode"]().encode(self.clip, text)[0] for text in (prompt.text, ""))
        latent = {"samples": torch.zeros(1, 16, height // 8, width // 8)}
        common = SEED + index, WINDOWED_STEPS, CFG, "euler", "simple"
        start = time.process_time()
        if way == "KSampler":
            out = self.nodes["KSampler"]().sample(self.model, *common, positive, negative, latent, 1.0)[0]
        else:
            run = self.nodes["AutoregressiveRollingDiffusionSampler"]().sample
            out = run(self.model, positive, negative, latent, *common, 1.0, order, window, overlap, 0.5)[0]
        seconds = time.process_time() - start
        pixels = numpy.asarray(self.vae.decode(out["samples"])[0].clamp(0, 1) * 255).round().astype("uint8")
        if self.pictures is not None:
            from PIL import Image

            self.pictures.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(self.pictures / f"{width}x{height}-{index:03}-{way}.png")
        verdict = judge(prompt, pixels)
        profile = pixels.reshape(height // 8, 8 * width, 3).mean(1).round().astype(int).tolist()
        return {"task": verdict.task, "right": bool(verdict.right), "found": verdict.found,
                "invented": verdict.invented, "seconds": seconds, "rows": profile}  # fmt: skip

    def run(self, count: int, results: Path) -> Iterator[str]:
        """A line for each canvas. Each picture is kept in `results` as it is done."""
        import numpy
        import torch

        from rolling_diffusion.world.score import Verdict, difference, make_prompts, more_invented, summary

        done = {}
        if results.is_file():
            done = {tuple(key): row for key, row in map(json.loads, results.read_text().splitlines())}
        prompts = make_prompts(count, 0)
        for canvas in CANVASES:
            rows: dict[str, list[dict]] = {"KSampler": [], "windows": []}
            for index, prompt in enumerate(prompts):
                for way in rows:
                    key = (self.dtype, *canvas, index, way)
                    if key not in done:
                        with torch.inference_mode():
                            done[key] = self.one(canvas, index, prompt, way)
                        with results.open("a") as file:
                            file.write(json.dumps([key, done[key]]) + "\n")
                    rows[way].append(done[key])
            stock, ours = ([Verdict(r["task"], r["right"], r["found"], r["invented"]) for r in rows[w]] for w in rows)
            scores = [
                "{:.3f} ({:.3f} to {:.3f})".format(s["score"], *s["interval"]) for s in map(summary, (stock, ours))
            ]
            ratio = sum(r["seconds"] for r in rows["windows"]) / sum(r["seconds"] for r in rows["KSampler"])
            width, height, order, window, overlap = canvas
            profiles = [numpy.array([r["rows"] for r in rows[way]]) for way in rows]
            apart = abs(profiles[0] - profiles[1]).mean()
            yield (
                f"{width}×{height} {order}, window {window}, overlap {overlap}, {count} prompts: score {scores[1]}, "
                f"KSampler's {scores[0]}; difference "
                + "{:+.3f} ({:+.3f} to {:+.3f})".format(*difference(ours, stock))
                + ", of invented objects {:+.3f} ({:+.3f} to {:+.3f})".format(*more_invented(ours, stock))
                + f"; rows of cells differ by {apart:.1f} of 255; {ratio:.2f} of its CPU time."
            )


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--windows", action="store_true", help="score and time of windows, instead of one block's time")
    parser.add_argument("--prompts", type=int, default=60, help="pictures of each canvas and way (default: 60)")
    parser.add_argument("--pairs", type=int, default=20, help="pairs of the tall canvas (default: 20)")
    parser.add_argument("--bf16", action="store_true", help="the transformer in bfloat16, faster on many CPUs")
    parser.add_argument("--results", type=Path, default=Path("windows.jsonl"), help="where to go on (windows.jsonl)")
    parser.add_argument("--pictures", type=Path, help="folder for the pictures")
    args = parser.parse_args()
    results, pictures = args.results.absolute(), args.pictures and args.pictures.absolute()
    comfyui = os.environ.get("COMFYUI_PATH", "")
    if not (Path(comfyui) / "main.py").is_file():
        print("COMFYUI_PATH must name a ComfyUI checkout: make bench-comfyui COMFYUI_PATH=/path/to/ComfyUI")
        return 2
    nodes = start(comfyui, *["--bf16-unet"] * args.bf16)
    if args.bf16:  # on a CPU, ComfyUI would keep weights in bfloat16 and compute in float32
        import comfy.model_management  # pyright: ignore[reportMissingImports]

        comfy.model_management.unet_manual_cast = lambda *_, **__: None
    if args.windows:
        for line in Windows(nodes, pictures, "bfloat16" if args.bf16 else "float32").run(args.prompts, results):
            print(line, flush=True)
        return 0
    import torch

    with torch.inference_mode():
        model, clip, _ = nodes["LoadEmbeddedRollingModel"]().load()
        prompt = nodes["CLIPTextEncode"]().encode(clip, "a red house left of a green tree")[0]

        def pair(height: int, *last: Any) -> tuple[Any, Any]:
            """The node and KSampler on a canvas 256 pixels wide, each to be run; last: order to persistence."""
            latent = {"samples": torch.zeros(1, 16, height // 8, SIDE // 8)}
            common = 1, STEPS, 1.0, "euler", "simple"
            ours = nodes["AutoregressiveRollingDiffusionSampler"]().sample
            stock = nodes["KSampler"]().sample
            return (
                lambda: ours(model, prompt, prompt, latent, *common, 1.0, *last)[0],
                lambda: stock(model, *common, prompt, prompt, latent, 1.0)[0],
            )

        ours, stock = pair(SIDE, "top-to-bottom", 64, 16, 0.5)
        if not torch.equal(stock()["samples"], ours()["samples"]):
            raise SystemExit("the two latents differ: there is nothing to compare")
        middle, every = ratios(ours, stock, PAIRS)
        rolled, rolls = ratios(*pair(TALL, *TALL_ROLLED, 0.5), args.pairs, time.process_time)
    print(
        f"One block of {SIDE}×{SIDE} pixels, {STEPS} Euler steps, the same latent bit for bit: the node "
        f"takes {middle:.3f} of KSampler's time, the median of {PAIRS} interleaved pairs "
        f"(quartiles {every[PAIRS // 4]:.3f} and {every[-PAIRS // 4]:.3f}; target: below 1.02)."
    )
    print(
        f"Rolling on {SIDE}×{TALL} pixels, {STEPS} Euler steps, {' '.join(map(str, TALL_ROLLED))}: {rolled:.2f} of "
        f"KSampler's time on the CPU, the median of {len(rolls)} interleaved pairs "
        f"(from {rolls[0]:.2f} to {rolls[-1]:.2f}; target: at most 1.3)."
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
