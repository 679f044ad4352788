"""FLUX.1-dev among ComfyUI's model files: what a file is, by ComfyUI's own detection, and loading it with its loaders.

Only the header of a file is read to tell what it is: names and shapes of tensors, none of their contents.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import comfy.model_detection
import comfy.sd
import comfy.supported_models
import comfy.utils
import folder_paths
import torch
from torch import Tensor

REPOSITORY = "black-forest-labs/FLUX.1-dev"
READABLE = (".safetensors", ".sft")
# Relatives with the very tensors of FLUX.1-dev, that only their names tell apart; others have more input channels.
RELATIVES = ("kontext", "controlnet")
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F8_E4M3": torch.float8_e4m3fn,
          "F8_E5M2": torch.float8_e5m2}  # fmt: skip
NAMES = {
    "clip_l": "clip_l.safetensors in models/text_encoders",
    "t5xxl": "t5xxl_fp16.safetensors (or t5xxl_fp8_e4m3fn.safetensors) in models/text_encoders",
    "vae": "ae.safetensors in models/vae",
}
NOWHERE = (
    "FLUX.1-dev was not found: put flux1-dev.safetensors into models/diffusion_models, clip_l.safetensors and "
    "t5xxl_fp16.safetensors (or t5xxl_fp8_e4m3fn.safetensors) into models/text_encoders and ae.safetensors into "
    "models/vae, or flux1-dev-fp8.safetensors, which holds all of them, into models/checkpoints; or accept the licence "
    f"of {REPOSITORY} on Hugging Face and log in with 'hf auth login', and the node downloads it."
)


@dataclass(frozen=True)
class Found:
    """A FLUX.1-dev: a file of ComfyUI's folders, or a folder in diffusers' layout."""

    name: str  # as the choice shows it, with the folder's kind in front
    path: str
    kind: str = "file"  # or "diffusers"
    holds: frozenset[str] = frozenset()  # of clip_l, t5xxl and vae, what the file has besides the transformer
    half: bool = True  # stored in 16 bits or more; an 8-bit transformer goes with 8-bit text encoders


@dataclass
class Parts:
    """What ComfyUI's loaders give."""

    model: Any = None
    clip: Any = None
    vae: Any = None


def find_flux() -> list[Found]:
    """Every FLUX.1-dev in ComfyUI's folders, the one to take first."""
    files = [
        Found(f"{kind}/{name}", path, "file", what - {"flux-dev", "half"}, "half" in what)
        for kind in ("diffusion_models", "checkpoints")
        for name, path, what in _files(kind)
        if "flux-dev" in what
    ]
    folders = [
        Found(f"diffusers/{index.parent.name}", str(index.parent), "diffusers")
        for root in _roots("diffusers")
        for index in sorted(Path(root).glob("*/model_index.json"))
        if _is_flux_folder(index)
    ]
    parts = {what for kind in ("text_encoders", "vae") for _, _, found in _files(kind) for what in found}

    def rank(found: Found) -> tuple:
        missing = {"clip_l", "t5xxl", "vae"} - found.holds - parts
        plain = found.name.lower().replace(".", "").replace("_", "-")
        return bool(missing), "flux1-dev" not in plain, found.name

    return sorted(files, key=rank) + folders


def fingerprint() -> str:
    """Changes when a file does that the node might read."""
    kinds = ("diffusion_models", "checkpoints", "text_encoders", "vae")
    paths = [path for kind in kinds for _, path, what in _files(kind) if what]
    return repr([(path, os.stat(path).st_size, os.stat(path).st_mtime_ns) for path in paths])


def load_parts(found: Found | None, need: Collection[str]) -> Parts:
    """Those of model, clip and vae that are needed, by ComfyUI's loaders; what `found` lacks from files of its own.

    Without `found` the model comes from elsewhere. FileNotFoundError names all that is missing, before anything loads.
    """
    holds = found.holds if found else frozenset()
    clip_inside, vae_inside = "clip" in need and holds >= {"clip_l", "t5xxl"}, "vae" in need and "vae" in holds
    wanted = ["clip_l", "t5xxl"] if "clip" in need and not clip_inside else []
    if "vae" in need and not vae_inside:
        wanted.append("vae")
    beside = _beside(found, wanted)
    embeddings = folder_paths.get_folder_paths("embeddings")
    parts = Parts()
    if found and (clip_inside or vae_inside):
        parts.model, parts.clip, parts.vae, *_ = comfy.sd.load_checkpoint_guess_config(
            found.path, output_vae=vae_inside, output_clip=clip_inside, embedding_directory=embeddings
        )
    elif found:
        parts.model = comfy.sd.load_diffusion_model(found.path)
    if "t5xxl" in beside:
        encoders = [beside["clip_l"], beside["t5xxl"]]
        parts.clip = comfy.sd.load_clip(encoders, embedding_directory=embeddings, clip_type=comfy.sd.CLIPType.FLUX)
    if "vae" in beside:
        state, metadata = comfy.utils.load_torch_file(beside["vae"], return_metadata=True)
        parts.vae = comfy.sd.VAE(sd=state, metadata=metadata)
        parts.vae.throw_exception_if_invalid()
    return parts


def _beside(found: Found | None, wanted: Sequence[str]) -> dict[str, str]:
    """The files of text encoders and autoencoder: the usual names first, and those stored as the transformer is."""
    usual = {"clip_l": ("clip_l",), "t5xxl": ("t5xxl",), "vae": ("ae.", "flux")}
    half = found is None or found.half
    out = {}
    for part in wanted:
        choices = [item for item in _files("vae" if part == "vae" else "text_encoders") if part in item[2]]
        ranks = [(not Path(n).name.lower().startswith(usual[part]), ("half" in w) != half, n) for n, _, w in choices]
        if choices:
            out[part] = choices[ranks.index(min(ranks))][1]
    missing = [NAMES[part] for part in wanted if part not in out]
    if missing:
        what = f"{found.name} is there, but still " if found else ""
        raise FileNotFoundError(f"FLUX.1-dev is not whole: {what}put {' and '.join(missing)}.")
    return out


# --- what a file is ---------------------------------------------------------------------------------------------------


def _files(kind: str) -> list[tuple[str, str, frozenset[str]]]:
    """(name, path, what it is) of the files of one of ComfyUI's folders."""
    out = []
    for name in folder_paths.get_filename_list(kind) if kind in folder_paths.folder_names_and_paths else ():
        path = folder_paths.get_full_path(kind, name)
        if path and name.lower().endswith(READABLE):
            state = os.stat(path)
            what = _what(path, state.st_size, state.st_mtime_ns)
            if any(word in name.lower() for word in RELATIVES):
                what -= {"flux-dev"}
            if "sd3" in name.lower():  # its autoencoder has FLUX.1's shapes, and other latents
                what -= {"vae"}
            out.append((name, path, what))
    return out


def _roots(kind: str) -> list[str]:
    return folder_paths.get_folder_paths(kind) if kind in folder_paths.folder_names_and_paths else []


@lru_cache(4096)
def _what(path: str, size: int, time: int) -> frozenset[str]:
    """Of "flux-dev", "clip_l", "t5xxl", "vae", what a file holds; and "half" if it is stored in 16 bits or more."""
    try:
        state = _header(path)
    except (OSError, ValueError, KeyError, struct.error):
        return frozenset()
    out = set()
    if _is_flux_dev(state):
        out.add("flux-dev")
    for prefix in ("text_encoders.clip_l.transformer.", ""):
        if _encoder(state, prefix) == "CLIP_L":
            out.add("clip_l")
    for prefix in ("text_encoders.t5xxl.transformer.", ""):
        if _encoder(state, prefix) == "T5_XXL":
            out.add("t5xxl")
    for prefix in ("vae.", "first_stage_model.", ""):
        first = state.get(f"{prefix}decoder.conv_in.weight")
        if first is not None and first.ndim == 4 and first.shape[1] == 16:
            out.add("vae")
    largest = max(state.values(), key=lambda tensor: tensor.numel(), default=None)
    if largest is not None and largest.element_size() > 1:
        out.add("half")
    return frozenset(out)


def _header(path: str) -> dict[str, Tensor]:
    """A file's tensors without their contents."""
    with open(path, "rb") as file:
        length = struct.unpack("<Q", file.read(8))[0]
        if length > 1 << 27:
            raise ValueError("not a safetensors file")
        entries = json.loads(file.read(length))
    entries.pop("__metadata__", None)
    return {
        key: torch.empty(entry["shape"], dtype=DTYPES.get(entry["dtype"], torch.uint8), device="meta")
        for key, entry in entries.items()
    }


def _is_flux_dev(state: dict[str, Tensor]) -> bool:
    """ComfyUI's Flux with an embedded guidance and no channels but the latent's."""
    # Cheap first: ComfyUI's detection of other families may look into tensors, or log what it does not know.
    if not any(key.endswith(("guidance_in.in_layer.weight", "guidance_embedder.linear_1.weight")) for key in state):
        return False
    if any("controlnet" in key for key in state):
        return False
    detection = comfy.model_detection
    try:
        prefix = detection.unet_prefix_from_state_dict(state)
        own = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)} or state
        config = detection.detect_unet_config(own, "")
        if config is None:
            own = detection.convert_diffusers_mmdit(own, "") or {}
            config = detection.detect_unet_config(own, "")
        if not config or config.get("image_model") != "flux" or not config.get("guidance_embed"):
            return False
        kind = detection.model_config_from_unet_config(config, own)
    except Exception:  # a file that is not what its first keys promise
        return False
    return type(kind) is comfy.supported_models.Flux and config["in_channels"] == 16


def _encoder(state: dict[str, Tensor], prefix: str) -> str:
    own = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    try:
        kind = comfy.sd.detect_te_model(own)
    except Exception:  # as above
        return ""
    return kind.name if kind else ""


def _is_flux_folder(index: Path) -> bool:
    """A folder in diffusers' layout with FLUX.1-dev's own pipeline and transformer."""
    try:
        kind = json.loads(index.read_text(encoding="utf-8")).get("_class_name", "")
        config = json.loads((index.parent / "transformer" / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, AttributeError):
        return False
    relative = any(word in index.parent.name.lower() for word in RELATIVES)
    return kind.endswith("FluxPipeline") and bool(config.get("guidance_embeds")) and not relative
