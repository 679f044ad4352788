"""Stable Diffusion 3 and 3.5. Latents are (B, C, height, width); the transformer cuts them into tokens by itself."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from diffusers.models.attention_processor import JointAttnProcessor2_0
from torch import Tensor
from torch.nn import functional as F

from ..core.order import Block
from .call import Call, Layer, Slot, embed_levels, forward, modulate_output
from .family import Family, Place


def attend(attn: Any, layer: Layer, x: Tensor, text: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """The attention of JointAttnProcessor2_0 over [image, text, memory], before the projections of its outputs."""

    def heads(projected: Tensor, norm: Any) -> Tensor:
        projected = projected.unflatten(-1, (attn.heads, -1))
        return projected if norm is None else norm(projected)

    query, key = heads(attn.to_q(x), attn.norm_q), heads(attn.to_k(x), attn.norm_k)
    value = heads(attn.to_v(x), None)
    if text is not None:
        query = torch.cat([query, heads(attn.add_q_proj(text), attn.norm_added_q)], 1)
        key = torch.cat([key, heads(attn.add_k_proj(text), attn.norm_added_k)], 1)
        value = torch.cat([value, heads(attn.add_v_proj(text), None)], 1)
    out = layer.attend(query, key, value).flatten(2).to(query.dtype)
    image, words = out[:, : x.shape[1]], out[:, x.shape[1] :]
    image = attn.to_out[1](attn.to_out[0](image))
    return image, None if text is None else words if attn.context_pre_only else attn.to_add_out(words)


def _feed(block: Any, ff: Any, x: Tensor) -> Tensor:
    """A feed-forward, in the chunks that enable_forward_chunking asked for."""
    if block._chunk_size is None:
        return ff(x)
    return torch.cat([ff(part) for part in x.split(block._chunk_size, dim=block._chunk_dim)], dim=block._chunk_dim)


def joint(
    self: Any, hidden_states, encoder_hidden_states, temb, joint_attention_kwargs=None
) -> tuple[Tensor | None, Tensor]:
    """The forward of JointTransformerBlock with temb (B, rows, width) instead of (B, width)."""
    layer, x, text = self.rolling, hidden_states, encoder_hidden_states
    shift, scale, gate, shift2, scale2, gate2, *second = layer.image(
        self.norm1.linear(F.silu(temb)), 9 if self.use_dual_attention else 6
    )
    y = self.norm1.norm(x)
    words = self.norm1_context.linear(F.silu(temb[:, : layer.texts]).to(text.dtype))
    if self.context_pre_only:
        t_scale, t_shift, *t = layer.text(words, 2)
    else:
        t_shift, t_scale, *t = layer.text(words, 6)
    attended, text_attended = attend(
        self.attn, layer, y * (1 + scale) + shift, self.norm1_context.norm(text) * (1 + t_scale) + t_shift
    )
    x = x + gate * attended
    if self.use_dual_attention:
        x = x + second[2] * attend(self.attn2, self.rolling2, y * (1 + second[1]) + second[0])[0]
    x = x + gate2 * _feed(self, self.ff, self.norm2(x) * (1 + scale2) + shift2)
    if self.context_pre_only:
        return None, x
    text = text + t[0] * text_attended
    return text + t[3] * _feed(self, self.ff_context, self.norm2_context(text) * (1 + t[2]) + t[1]), x


def place_tokens(self: Any, patches: Tensor) -> Tensor:
    """The forward of PatchEmbed for chosen tokens, laid side by side in one row: (B, C, p, tokens · p)."""
    tokens, height, width = self.rolling
    x = self.proj(patches).flatten(2).transpose(1, 2)
    return (x + self.cropped_pos_embed(height, width)[:, tokens]).to(x.dtype)


class SD3(Family):
    text_first = False
    PROCESSORS = (JointAttnProcessor2_0,)

    def __init__(self, model: Any):
        self.patch = model.config.patch_size

    def canvas(self, prepared: Any) -> tuple[int, int]:
        latents = prepared if isinstance(prepared, Tensor) else prepared[0]
        return latents.shape[-2], latents.shape[-1]

    def cut(self, latents: Tensor, block: Block, place: Place) -> Tensor:
        return latents[..., block.rows, block.columns]

    def paste(self, latents: Tensor, block: Block, place: Place, part: Tensor) -> None:
        latents[..., block.rows, block.columns] = part

    def blank(self, part: Tensor, height: int, width: int) -> Tensor:
        return part.new_zeros(len(part), part.shape[1], height, width)

    def cells(self, latents: Tensor, height: int, width: int) -> Tensor:
        return latents

    def latents(self, cells: Tensor) -> Tensor:
        return cells

    def level(self, timesteps: Tensor, request: dict[str, Any]) -> Tensor:
        return timesteps.to(request["timestep"].dtype)

    def image_tokens(self, request: dict[str, Any]) -> int:
        return request["hidden_states"].shape[-2] * request["hidden_states"].shape[-1] // self.patch**2

    def references(self, request: dict[str, Any], height: int, width: int) -> int:
        return 0

    def blend(self, request: dict[str, Any], noise: Tensor, sigma: float) -> dict[str, Any]:
        x = request["hidden_states"].clone()
        noise = noise.to(x).repeat(len(x) // len(noise), 1, 1, 1)
        x[:, : noise.shape[1]] = (1 - sigma) * x[:, : noise.shape[1]] + sigma * noise
        return request | {"hidden_states": x}

    def choose(self, request: dict[str, Any], tokens: Tensor, height: int, width: int) -> dict[str, Any]:
        x, p = request["hidden_states"], self.patch
        patches = x.unflatten(3, (-1, p)).unflatten(2, (-1, p))  # B, C, rows, p, columns, p
        patches = patches.permute(0, 1, 3, 2, 4, 5).flatten(3, 4)[:, :, :, tokens.to(x.device)]  # B, C, p, tokens, p
        chosen = request | {"hidden_states": patches.flatten(3)}
        residuals = request.get("block_controlnet_hidden_states")
        if residuals is not None:
            chosen["block_controlnet_hidden_states"] = [residual[:, tokens] for residual in residuals]
        return chosen

    def parts(self, answer: Tensor, blocks: Sequence[Block], places: Sequence[Place]) -> list[Tensor]:
        tokens = answer.unflatten(3, (-1, self.patch))  # B, C, p, tokens, p
        out = []
        for block, place in zip(blocks, places):
            part = tokens[:, :, :, place].unflatten(3, (block.height // self.patch, -1))  # B, C, p, rows, columns, p
            out.append(part.permute(0, 1, 3, 2, 4, 5).flatten(4).flatten(2, 3))
        return out

    def blocks(self, model: Any) -> Iterable[Any]:
        return model.transformer_blocks

    def swaps(self, model: Any, call: Call) -> Iterator[Slot]:
        yield vars(model.time_text_embed), "rolling", call.levels.pooled
        yield forward(model.time_text_embed, embed_levels)
        yield vars(model.pos_embed), "rolling", call.places
        yield forward(model.pos_embed, place_tokens)
        for block in model.transformer_blocks:
            yield vars(block), "rolling", call.attention()
            if block.use_dual_attention:
                yield vars(block), "rolling2", call.attention(text=0)
            yield forward(block, joint)
        yield vars(model.norm_out), "rolling", call.plain
        yield forward(model.norm_out, modulate_output)
