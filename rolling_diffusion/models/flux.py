"""FLUX.1: [dev], [schnell], Fill, Kontext, the Control models, and what is built like them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor, FluxIPAdapterAttnProcessor
from torch import Tensor
from torch.nn import functional as F

from .call import Call, Slot, embed_levels, forward, modulate_output, processor
from .family import Family

PATCH = 2


def pack(x: Tensor) -> Tensor:
    """(B, C, h, w) cells to (B, tokens, 4C), channels outermost within a token, as FluxPipeline packs them."""
    x = x.unflatten(3, (-1, PATCH)).unflatten(2, (-1, PATCH))  # B, C, rows, 2, columns, 2
    return x.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """(B, tokens, 4C) to (B, C, height, width) cells: the inverse of pack."""
    x = tokens.unflatten(2, (-1, PATCH, PATCH)).unflatten(1, (height // PATCH, width // PATCH))
    return x.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)


def _finite(x: Tensor) -> Tensor:
    return x.clip(-65504, 65504) if x.dtype == torch.float16 else x  # as diffusers does


def double(
    self: Any, hidden_states, encoder_hidden_states, temb, image_rotary_emb=None, joint_attention_kwargs=None
) -> tuple[Tensor, Tensor]:
    """The forward of FluxTransformerBlock with temb (B, rows, width) instead of (B, width)."""
    layer, x, text = self.rolling, hidden_states, encoder_hidden_states
    shift, scale, gate, shift2, scale2, gate2 = layer.image(self.norm1.linear(F.silu(temb)), 6)
    t = layer.text(self.norm1_context.linear(F.silu(temb[:, : layer.texts])), 6)  # same order, for the text
    attended, text_attended, *adapted = self.attn(  # the third: an IP-Adapter's part
        hidden_states=self.norm1.norm(x) * (1 + scale) + shift,
        encoder_hidden_states=self.norm1_context.norm(text) * (1 + t[1]) + t[0],
        image_rotary_emb=image_rotary_emb,
        **{**(joint_attention_kwargs or {}), "attention_mask": layer},
    )
    x = x + gate * attended
    x = x + gate2 * self.ff(self.norm2(x) * (1 + scale2) + shift2)
    x = x + adapted[0] if adapted else x
    text = text + t[2] * text_attended
    text = text + t[5] * self.ff_context(self.norm2_context(text) * (1 + t[4]) + t[3])
    return _finite(text), x


def single(
    self: Any, hidden_states, encoder_hidden_states, temb, image_rotary_emb=None, joint_attention_kwargs=None
) -> tuple[Tensor, Tensor]:
    """The forward of FluxSingleTransformerBlock with temb (B, rows, width) instead of (B, width)."""
    layer, text = self.rolling, encoder_hidden_states.shape[1]
    x = torch.cat([encoder_hidden_states, hidden_states], dim=1)
    shift, scale, gate = layer.both(self.norm.linear(F.silu(temb)), 3)
    y = self.norm.norm(x) * (1 + scale) + shift
    mlp = self.act_mlp(self.proj_mlp(y))
    options = {**(joint_attention_kwargs or {}), "attention_mask": layer}
    attended = self.attn(hidden_states=y, image_rotary_emb=image_rotary_emb, **options)
    x = _finite(x + gate * self.proj_out(torch.cat([attended, mlp], dim=2)))
    return x[:, :text], x[:, text:]


class Flux(Family):
    PROCESSORS = (FluxAttnProcessor, FluxIPAdapterAttnProcessor)

    def cells(self, latents: Tensor, height: int, width: int) -> Tensor:
        return unpack(latents, height, width)

    def latents(self, cells: Tensor) -> Tensor:
        return pack(cells)

    def shifted(self, request: dict[str, Any], rows: int, columns: int, tokens: int) -> dict[str, Any]:
        ids = request["img_ids"].float()  # bfloat16 holds them up to 256 only
        offset = ids.new_zeros(ids.shape[-1])
        offset[1], offset[2] = rows, columns
        ids = torch.cat([ids[..., :tokens, :] - offset, ids[..., tokens:, :]], -2)
        return request | {"img_ids": ids}

    @property
    def turns(self) -> bool:
        return True

    def around(self, request: dict[str, Any], places: Tensor) -> dict[str, Any]:
        ids = request["img_ids"].float().clone()
        ids[..., : len(places), 1:3] = places.to(ids)
        return request | {"img_ids": ids}

    def turned(self, model: Any, key: Tensor, by: Tensor) -> Tensor:
        ids = by.new_zeros(len(by), len(model.config.axes_dims_rope), dtype=torch.float32)
        ids[:, 1:3] = by
        turned: Any = apply_rotary_emb(key, model.pos_embed(ids), sequence_dim=1)
        return turned

    def moved(self, request: dict[str, Any], rows: Tensor, columns: Tensor) -> dict[str, Any]:
        ids = request["txt_ids"].float().clone()
        ids[..., 1] += rows
        ids[..., 2] += columns
        return request | {"txt_ids": ids}

    def choose(self, request: dict[str, Any], tokens: Tensor, height: int, width: int) -> dict[str, Any]:
        x, ids = request["hidden_states"], request["img_ids"]
        ids = ids[0] if ids.ndim == 3 else ids
        tokens = self.with_references(tokens, request, height, width)
        # bfloat16 holds positions exactly up to 256 only, and the model takes them as float32 anyway.
        chosen = request | {"hidden_states": x[:, tokens], "img_ids": ids.float()[tokens]}
        for name in ("controlnet_block_samples", "controlnet_single_block_samples"):
            if request.get(name) is not None:
                chosen[name] = [residual[:, tokens] for residual in request[name]]
        return chosen

    def blocks(self, model: Any) -> Iterable[Any]:
        return [*model.transformer_blocks, *model.single_transformer_blocks]

    def swaps(self, model: Any, call: Call) -> Iterator[Slot]:
        yield vars(model.time_text_embed), "rolling", call.levels.pooled
        yield forward(model.time_text_embed, embed_levels)
        for blocks, function in ((model.transformer_blocks, double), (model.single_transformer_blocks, single)):
            for block in blocks:
                yield vars(block), "rolling", call.attention()
                yield forward(block, function)
                yield processor(block.attn)
        if hasattr(model, "norm_out"):  # a ControlNet has none
            yield vars(model.norm_out), "rolling", call.plain
            yield forward(model.norm_out, modulate_output)


def _chosen_condition(self: Any, condition: Tensor) -> Tensor:
    """The forward of a ControlNet's embedder, for the chosen tokens of a condition that is given for all."""
    return type(self).forward(self, condition)[:, self.rolling[0]]


class Control(Flux):
    """A ControlNet for FLUX.1: the same blocks, whose residuals are wanted."""

    def text_tokens(self, request: dict[str, Any]) -> int:
        return super().text_tokens(request) + (request.get("controlnet_mode") is not None)  # union: one more, in front

    def swaps(self, model: Any, call: Call) -> Iterator[Slot]:
        yield from super().swaps(model, call)
        yield vars(model.controlnet_x_embedder), "rolling", call.places
        yield forward(model.controlnet_x_embedder, _chosen_condition)
