"""The node that draws without end: numbered slices in the output folder, while it runs."""

from __future__ import annotations

import json
import os
from hashlib import blake2b
from pathlib import Path
from typing import Any

import comfy.utils
import folder_paths
import numpy
import torch
from comfy.cli_args import args
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from ..core.growing import Along, Stretch, stretches
from . import inputs, nodes
from .growing import Growing, decoder
from .places import read, spread
from .settings import Settings

SMALL = 4096 * 4096  # pixels up to which the whole strip is handed on
STATE = "state.safetensors"


class RollingStream(inputs.Early):
    """Prompts in, a folder of slices out."""

    CATEGORY = nodes.CATEGORY
    FUNCTION = "draw"
    OUTPUT_NODE = True
    RETURN_TYPES = ("IMAGE", "STRING")
    RETURN_NAMES = ("image", "folder")
    OUTPUT_TOOLTIPS = ("The whole strip if it is small, else the newest slice.", "The folder of the slices.")
    DESCRIPTION = (
        "Draws a picture of any length, stretch after stretch, with prompts that change along it. Numbered slices are "
        "written to the output folder while it runs. Cancelled, it goes on where it stopped when it is queued again "
        "with the same settings."
    )
    SEARCH_ALIASES = ("infinite canvas", "endless", "rolling", "strip", "panorama", "long picture")

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {
            "required": {
                "model": nodes.SOCKETS["model"],
                "clip": inputs.lazy("CLIP", "The model's text encoders."),
                "vae": inputs.lazy("VAE", "The model's autoencoder."),
                "prompts": inputs.PROMPTS,
                "negative_prompt": ("STRING", {"multiline": True, "default": "",
                                               "tooltip": "What no part is to show."}),
                "length": ("INT", {"default": 4096, "min": 0, "max": 1 << 30, "step": 16,
                                   "tooltip": "Pixels along the order. 0: a stretch for each prompt."}),
                "across": ("INT", {"default": 1024, "min": 16, "max": inputs.MOST_PIXELS, "step": 16,
                                   "tooltip": "Pixels across the order."}),
                "seed": inputs.SEED,
                "steps": nodes.STEPS,
                "cfg": nodes.CFG,
                "sampler_name": nodes.SAMPLER,
                "scheduler": nodes.SCHEDULER,
                "autoregressive_order": inputs.STRAIGHT_ORDER,
                **nodes.ROLLING,
                "stretch": inputs.STRETCH,
                "context": inputs.CONTEXT,
                "filename_prefix": ("STRING", {"default": "rolling/strip",
                                               "tooltip": "Of the folder of slices, in the output folder."}),
            },
            "optional": {**inputs.EXTRAS, **inputs.NEWER},
            "hidden": {"prompt": "PROMPT", "extra_pnginfo": "EXTRA_PNGINFO", "unique_id": "UNIQUE_ID"},
        }  # fmt: skip

    def draw(self, model, clip, vae, prompts, negative_prompt, length, across, seed, steps, cfg, sampler_name,
             scheduler, autoregressive_order, rolling_window_size, rolling_overlap, attention_persistence, stretch,
             context, filename_prefix, draft=-1, lookahead=-1, context_noise=0.0, memory_cap=0, extrapolation=0.0,
             prompt=None, extra_pnginfo=None, unique_id=None):  # fmt: skip
        settings = Settings(autoregressive_order, rolling_window_size, rolling_overlap, attention_persistence,
                            draft, lookahead, context_noise, memory_cap, seed, extrapolation)  # fmt: skip
        values = [prompts, negative_prompt, length, across, steps, cfg, sampler_name, scheduler, stretch, context]
        grow = Growing(model, settings, steps, cfg, sampler_name, scheduler, autoregressive_order)
        parts = parts_of(prompts, length, grow, grow.cells("stretch", stretch))
        across, context = grow.cells("across", across), grow.cells("context", context)
        name = settings_name(prompt, unique_id) or digest([values, repr(settings)])
        strip = Strip(filename_prefix, name, grow.way, metadata(prompt, extra_pnginfo))
        state = strip.state()
        done, before = (0, None) if state is None else (int(state["number"]), state["context"])
        grow.notes.tell(f"Slices are written to {strip.folder}.")
        if 0 < done < len(parts):
            grow.notes.tell(f"It goes on after {done} of {len(parts)} stretches.")
        if done < len(parts):
            texts = {each.prompt for each in parts[done:]} | {negative_prompt}
            said = {text: clip.encode_from_tokens_scheduled(clip.tokenize(text)) for text in sorted(texts)}
            decode = decoder(vae, grow.way, state)
            for i, each in enumerate(parts[done:], done):
                new = grow.stretch(i, each, across, said[each.prompt], said[negative_prompt], before)
                before = grow.way.last(new if before is None else grow.way.join(before, new), context)
                strip.add(decode.add(new, each.last))
                strip.keep({**decode.state(), "number": torch.tensor(i + 1), "context": before})
                strip.show(i + 1, len(parts))
        shown = [
            {"filename": path.name, "subfolder": strip.subfolder, "type": "output"} for path in strip.slices()[-1:]
        ]
        return {"ui": {"images": shown}, "result": (strip.image(), str(strip.folder))}


def parts_of(prompts: str, length: int, grow: Growing, own: int) -> list[Stretch]:
    """The stretches. ValueError, one sentence, for what cannot be."""
    lines = read(prompts)
    total = grow.cells("length", length) or None
    if total is None and any(isinstance(place, float) for place, _ in lines):
        raise ValueError("prompts has places that are shares, and length is 0: say a length.")
    said: Any = [text for _, text in lines]
    if total is not None or lines[0][0] is not None:
        placed = spread(lines)
        said = [(grow.cells("a prompt's place", p) if isinstance(p, int) else p, text) for p, text in placed]
    if total is None and not isinstance(said[0], str):
        total = said[-1][0] + own
    return list(stretches(said, total, own, grow.multiple))


class Strip:
    """The folder of slices, and the state from which it goes on. What is written is written whole."""

    def __init__(self, prefix: str, name: str, way: Along, info: PngInfo | None):
        output = Path(folder_paths.get_output_directory()).resolve()
        self.folder = (output / f"{prefix}_{name}").resolve()
        if not self.folder.is_relative_to(output) or self.folder == output:
            raise ValueError(f"filename_prefix is {prefix!r}, and must stay within the output folder.")
        self.subfolder = self.folder.relative_to(output).as_posix()
        self.way, self.info, self.count, self.newest = way, info, 0, None

    def state(self) -> dict[str, Tensor] | None:
        """What was kept, if anything was."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / STATE
        if not path.is_file():
            return None
        state = comfy.utils.load_torch_file(str(path), safe_load=True)
        state = {name: tensor.clone() for name, tensor in state.items()}  # the file is to be written again
        self.count = int(state["slices"])
        lost = next((path for path in self.slices() if not path.is_file()), None)
        if lost is not None:
            raise ValueError(f"{lost} was drawn and is gone: delete its folder to have all of it drawn anew.")
        return state

    def slices(self) -> list[Path]:
        return [self.folder / f"{i + 1:05}.png" for i in range(self.count)]

    def add(self, pixels: Tensor) -> None:
        """A slice, (1, 3, height, width); nothing where none of it is final yet."""
        if not pixels.numel():
            return
        self.newest = Image.fromarray((255 * pixels[0].movedim(0, -1)).round().byte().cpu().numpy())
        self.count += 1
        path = self.slices()[-1]
        self.newest.save(path.with_suffix(".part"), "PNG", pnginfo=self.info, compress_level=4)
        os.replace(path.with_suffix(".part"), path)

    def keep(self, state: dict[str, Tensor]) -> None:
        """After a slice, never before it: what was lost in between is drawn again, and is the same."""
        path = self.folder / STATE
        state = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in state.items()}
        comfy.utils.save_torch_file({**state, "slices": torch.tensor(self.count)}, str(path.with_suffix(".part")))
        os.replace(path.with_suffix(".part"), path)

    def show(self, done: int, total: int) -> None:
        """The newest slice on the node."""
        preview = ("JPEG", self.newest, 1024) if self.newest is not None else None
        comfy.utils.ProgressBar(total).update_absolute(done, total, preview)

    def image(self) -> Tensor:
        """(1, height, width, 3): the strip, or the newest slice of a large one."""
        paths = self.slices()
        sizes = [Image.open(path).size for path in paths]
        if sum(width * height for width, height in sizes) > SMALL:
            paths = paths[-1:]
        found = [torch.from_numpy(numpy.array(Image.open(path).convert("RGB"))) for path in paths]
        return self.way.join(*(each.movedim(-1, 0)[None].float() / 255 for each in found)).movedim(1, -1)


def digest(said: Any) -> str:
    return blake2b(json.dumps(said, sort_keys=True, default=str).encode(), digest_size=5).hexdigest()


def settings_name(prompt: dict | None, node: str | None) -> str:
    """A name for all that a node is told, and the nodes that it hangs on; nothing where that is not known."""
    known: dict[str, str] = {}
    graph = prompt or {}

    def name(node: str) -> str:
        if node not in known:
            told = {}
            for key, value in graph[node]["inputs"].items():
                if isinstance(value, list) and len(value) == 2 and str(value[0]) in graph:
                    value = [name(str(value[0])), value[1]]
                told[key] = value
            known[node] = digest([graph[node]["class_type"], told])
        return known[node]

    return name(str(node)) if str(node) in graph else ""


def metadata(prompt: Any, extra: Any) -> PngInfo | None:
    """As ComfyUI's own pictures have it, so that a slice opens its workflow."""
    if args.disable_metadata:
        return None
    info = PngInfo()
    for key, value in {"prompt": prompt, **(extra or {})}.items():
        if value is not None:
            info.add_text(key, json.dumps(value))
    return info
