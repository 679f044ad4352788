"""Weights in diffusers' layout to and from the keys that ComfyUI reads.

Key layouts: black-forest-labs/flux (src/flux/model.py and modules/layers.py) for the transformer; ComfyUI's
comfy/utils.py (flux_to_diffusers) and comfy/taesd/taesd.py for the rest.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

State = Mapping[str, Tensor]

# ComfyUI's module, and the modules of diffusers whose rows it stacks. "*" is a layer number.
_EMBEDDERS = [
    ("img_in", "x_embedder"),
    ("txt_in", "context_embedder"),
    ("final_layer.linear", "proj_out"),
    ("final_layer.adaLN_modulation.1", "norm_out.linear"),
] + [
    (f"{ours}_in.{layer}_layer", f"time_text_embed.{theirs}_embedder.linear_{i}")
    for ours, theirs in (("time", "timestep"), ("vector", "text"), ("guidance", "guidance"))
    for i, layer in enumerate(("in", "out"), start=1)
]
_DOUBLE = [
    (f"{stream}_{ours}", *names)
    for stream, rows in {
        "img": {
            "mod.lin": ["norm1.linear"],
            "attn.qkv": ["attn.to_q", "attn.to_k", "attn.to_v"],
            "attn.norm.query_norm": ["attn.norm_q"],
            "attn.norm.key_norm": ["attn.norm_k"],
            "attn.proj": ["attn.to_out.0"],
            "mlp.0": ["ff.net.0.proj"],
            "mlp.2": ["ff.net.2"],
        },
        "txt": {
            "mod.lin": ["norm1_context.linear"],
            "attn.qkv": ["attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"],
            "attn.norm.query_norm": ["attn.norm_added_q"],
            "attn.norm.key_norm": ["attn.norm_added_k"],
            "attn.proj": ["attn.to_add_out"],
            "mlp.0": ["ff_context.net.0.proj"],
            "mlp.2": ["ff_context.net.2"],
        },
    }.items()
    for ours, names in rows.items()
]
_SINGLE = [
    ("modulation.lin", "norm.linear"),
    ("linear1", "attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    ("linear2", "proj_out"),
    ("norm.query_norm", "attn.norm_q"),
    ("norm.key_norm", "attn.norm_k"),
]


def _rows(doubles: int, singles: int) -> list[tuple[str, ...]]:
    """(ComfyUI's key, diffusers' keys stacked in it) for every tensor that a Flux of this depth may have."""
    modules = list(_EMBEDDERS)
    for count, prefix, theirs, table in (
        (doubles, "double_blocks", "transformer_blocks", _DOUBLE),
        (singles, "single_blocks", "single_transformer_blocks", _SINGLE),
    ):
        for i in range(count):
            modules += [(f"{prefix}.{i}.{row[0]}", *(f"{theirs}.{i}.{name}" for name in row[1:])) for row in table]
    rows = []
    for ours, *names in modules:
        rows.append((f"{ours}.{'scale' if ours.endswith('_norm') else 'weight'}", *(f"{n}.weight" for n in names)))
        rows.append((f"{ours}.bias", *(f"{n}.bias" for n in names)))
    return rows


def _depth(state: State, prefix: str) -> int:
    return len({key.split(".")[1] for key in state if key.startswith(f"{prefix}.")})


def _halves_swapped(key: str, tensor: Tensor) -> Tensor:
    """The last modulation is (shift, scale) in ComfyUI and (scale, shift) in diffusers; its own inverse."""
    return torch.cat(tensor.chunk(2)[::-1]) if "adaLN_modulation" in key else tensor


def _check_rest(state: State, used: set[str], hint: str) -> None:
    rest = sorted(set(state) - used)
    if rest:
        raise ValueError(f"{len(rest)} tensors are not part of a Flux transformer, {rest[0]} among them: {hint}.")


def flux_to_comfy(state: State) -> dict[str, Tensor]:
    """A diffusers Flux transformer's state dict under the keys of FLUX.1's own files, which ComfyUI reads."""
    out: dict[str, Tensor] = {}
    used: set[str] = set()
    for ours, *names in _rows(_depth(state, "transformer_blocks"), _depth(state, "single_transformer_blocks")):
        if names[0] in state:
            out[ours] = _halves_swapped(ours, torch.cat([state[n] for n in names]) if names[1:] else state[names[0]])
            used.update(names)
    _check_rest(state, used, "fuse LoRA layers and undo quantisation before converting")
    if not out:
        raise ValueError("This is not the state dict of a Flux transformer: it has no tensors.")
    return out


def flux_from_comfy(state: State) -> dict[str, Tensor]:
    """The inverse of flux_to_comfy, for any width; a "model.diffusion_model." prefix is taken off."""
    prefix = "model.diffusion_model."
    if any(key.startswith(prefix) for key in state):
        state = {key[len(prefix) :]: tensor for key, tensor in state.items() if key.startswith(prefix)}
    # Newer ComfyUI tools write "weight" for the scale of a norm.
    state = {k[:-6] + "scale" if k.endswith("_norm.weight") else k: tensor for k, tensor in state.items()}
    if "img_in.weight" not in state:
        raise ValueError("This is not a Flux checkpoint: it has no img_in.weight.")
    width = state["img_in.weight"].shape[0]
    out: dict[str, Tensor] = {}
    used: set[str] = set()
    for ours, *names in _rows(_depth(state, "double_blocks"), _depth(state, "single_blocks")):
        if ours in state:
            tensor = _halves_swapped(ours, state[ours])
            if len(names) == 1:
                out[names[0]] = tensor
            else:  # q, k, v, and in single blocks the rest for the MLP
                sizes = [width] * (len(names) - 1)
                parts = tensor.split([*sizes, tensor.shape[0] - sum(sizes)])
                out.update((name, part.clone()) for name, part in zip(names, parts))
            used.add(ours)
    _check_rest(state, used, "give the transformer alone, unquantised")
    return out


COMFY_FLUX_SCALE, COMFY_FLUX_SHIFT = 0.3611, 0.1159  # comfy/latent_formats.py, class Flux


def tiny_vae_to_comfy(state: State, config: Mapping[str, Any]) -> dict[str, Tensor]:
    """An AutoencoderTiny's state dict and config as the one TAESD file that ComfyUI's VAELoader reads.

    ComfyUI gives a Flux VAE latents / 0.3611 + 0.1159 and TAESD decodes (that - vae_shift) * vae_scale; diffusers
    decodes latents / scaling_factor + shift_factor. vae_scale and vae_shift make the two the same.
    """
    shape = {
        "encoder_block_out_channels": [64] * 4,
        "decoder_block_out_channels": [64] * 4,
        "num_encoder_blocks": [1, 3, 3, 3],
        "num_decoder_blocks": [3, 3, 3, 1],
    }
    for name, expected in shape.items():
        if list(config.get(name, expected)) != expected:
            raise ValueError(f"ComfyUI's tiny autoencoder has {name} {expected}, this one {list(config[name])}.")
    if config.get("act_fn", "relu") != "relu" or config.get("latent_magnitude", 3) != 3:
        raise ValueError("ComfyUI's tiny autoencoder has act_fn relu and latent_magnitude 3; this one has others.")
    out = {}
    for key, tensor in state.items():
        part, _, index, rest = key.split(".", 3)
        # ComfyUI's decoder counts its clamp as layer 0.
        out[f"taesd_{part}.{int(index) + (part == 'decoder')}.{rest}"] = tensor
    scale = COMFY_FLUX_SCALE / config.get("scaling_factor", 1.0)
    out["vae_scale"] = torch.tensor(scale)
    out["vae_shift"] = torch.tensor(COMFY_FLUX_SHIFT - config.get("shift_factor", 0.0) / scale)
    return out
