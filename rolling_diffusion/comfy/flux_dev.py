"""The Flux-Dev node: from a prompt to a picture on the library's own pipeline."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import comfy.latent_formats
import comfy.model_management as management
import comfy.utils
import folder_paths
import latent_preview
import torch

from . import inputs
from .canvas import log

REPOSITORY = "black-forest-labs/FLUX.1-dev"
EMBEDDED, FLUX_DEV = "embedded", "FLUX.1-dev"
WEIGHTS = (".safetensors", ".sft", ".gguf")


@dataclass(frozen=True)
class Found:
    """Where a pipeline's weights are: a model folder or a repository, or one file with what lies beside it."""

    source: str
    single_file: bool = False
    parts: dict[str, str] = field(default_factory=dict)  # clip, t5, vae: files of ComfyUI's folders


def find_flux_dev() -> Found:
    """ComfyUI's model folders first, then the hub (its cache before a download, as the hub's own client does)."""
    for root in _folders("diffusers"):
        for index in sorted(Path(root).glob("*/model_index.json")):
            if _named(index.parent.name):
                return Found(str(index.parent))
    for kind in ("checkpoints", "diffusion_models"):
        for name in _files(kind):
            if _named(name) and name.endswith(WEIGHTS):
                parts = {
                    "clip": _first("text_encoders", "clip_l"),
                    "t5": _first("text_encoders", "t5xxl"),
                    "vae": _first("vae", "ae.") or _first("vae", "flux"),
                }
                path = folder_paths.get_full_path(kind, name)
                return Found(str(path), True, {k: v for k, v in parts.items() if v})
    return Found(REPOSITORY)


def _named(name: str) -> bool:
    """Is this FLUX.1-dev's own, and not one of its relatives (Fill, Kontext, Canny, …), which need other pipelines?"""
    plain = name.lower().replace(".", "").replace("_", "-")
    relatives = ("fill", "kontext", "canny", "depth", "redux", "controlnet", "lora", "vae")
    return "flux1-dev" in plain and not any(word in plain for word in relatives)


def _folders(kind: str) -> list[str]:
    return folder_paths.get_folder_paths(kind) if kind in folder_paths.folder_names_and_paths else []


def _files(kind: str) -> list[str]:
    return folder_paths.get_filename_list(kind) if kind in folder_paths.folder_names_and_paths else []


def _first(kind: str, start: str) -> str | None:
    for name in _files(kind):
        if Path(name).name.lower().startswith(start):
            return folder_paths.get_full_path(kind, name)
    return None


class FluxDevAutoRegressiveRollingDiffusionSampler:
    """Prompt in, LATENT and IMAGE out."""

    CATEGORY = "sampling/custom_sampling"
    FUNCTION = "sample"
    RETURN_TYPES = ("LATENT", "IMAGE")
    RETURN_NAMES = ("latent", "image")
    OUTPUT_TOOLTIPS = ("The latent, for VAE Decode with the Flux VAE.", "The finished picture.")
    DESCRIPTION = (
        "From a prompt to a picture with FLUX.1-dev, generated in an order. Finds the weights in ComfyUI's model folders or "
        "the Hugging Face cache. The embedded model runs at once, on any machine."
    )
    SEARCH_ALIASES = ("flux", "flux-dev", "autoregressive", "rolling", "text to image")

    def __init__(self):
        self.loaded: tuple[tuple, Any, Any] | None = None  # what for, the pipeline, and what ComfyUI manages of it

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        size = {"default": 512, "min": 256, "max": 1024, "step": 64, "tooltip": "Pixels."}
        return {
            "required": {
                "prompt": ("STRING", {"multiline": True, "default": "A beautiful landscape with mountains and a lake",
                                      "tooltip": "What the picture is to show."}),
                "negative_prompt": ("STRING", {"multiline": True, "default": "blurry, low quality, distorted",
                                               "tooltip": "What the picture is not to show."}),
                "width": ("INT", size),
                "height": ("INT", size),
                "seed": inputs.SEED,
                "steps": ("INT", {"default": 20, "min": 1, "max": 100, "tooltip": "Steps that every block takes."}),
                "cfg": ("FLOAT", {"default": 7.0, "min": 0.0, "max": 20.0, "step": 0.1, "tooltip": "Guidance."}),
                "autoregressive_order": inputs.ORDER,
                "rolling_window_size": inputs.WINDOW,
                "rolling_overlap": inputs.OVERLAP,
                "attention_persistence": inputs.PERSISTENCE,
                "enable_cpu_offload": (["True", "False"], {
                    "default": "True", "tooltip": "Keep on the GPU only the part of the model that is at work."}),
            },
            "optional": {
                "model": ([FLUX_DEV, EMBEDDED], {
                    "default": FLUX_DEV, "tooltip": "FLUX.1-dev, or the small model that ships with this pack."}),
                **inputs.EXTRAS,
            },
        }  # fmt: skip

    @classmethod
    def VALIDATE_INPUTS(cls, rolling_window_size=None, rolling_overlap=None, draft=None, steps=None):
        return inputs.problem(rolling_window_size, rolling_overlap, None, draft, steps, most_steps=100) or True
