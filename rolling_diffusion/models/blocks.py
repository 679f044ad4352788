"""Flux's attention and blocks with a noise level per token and with memory, on diffusers' own modules."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_flux import (
    FluxAttnProcessor,
    FluxIPAdapterAttnProcessor,
    FluxSingleTransformerBlock,
    FluxTransformerBlock,
    _get_qkv_projections,
)
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Call:
    """What a block must know of a rolling call; travels to it in joint_attention_kwargs["rolling"]."""

    # No layer number here, and no choice in keep: compiled blocks would be compiled again for each.
    text_tokens: int
    index: Tensor | None  # (image tokens,) noise level of each; None when text and image share one
    joint_index: Tensor | None  # (text + image tokens,) row of temb for each; None when there is one row
    past: tuple[Tensor, Tensor] | None  # this layer's memory
    bias: Tensor | None  # (1, 1, 1, all keys) added to the logits
    kept: list[tuple[Tensor, Tensor]]  # takes (key, value) of the image tokens

    def image(self, linear: nn.Module, temb: Tensor, parts: int) -> Sequence[Tensor]:
        """Modulation of the image tokens, each part (B, tokens or 1, width)."""
        # temb's first row is the text's level. One matrix product per level, then a gather to tokens: a product per
        # token would cost as much as the MLP.
        rows = temb if self.index is None else temb[:, 1:]
        return self._spread(linear(F.silu(rows)).chunk(parts, dim=-1), self.index)

    def joint(self, linear: nn.Module, temb: Tensor, parts: int) -> Sequence[Tensor]:
        """The same for text and image tokens in one sequence."""
        return self._spread(linear(F.silu(temb)).chunk(parts, dim=-1), self.joint_index)

    @staticmethod
    def _spread(parts: Sequence[Tensor], index: Tensor | None) -> Sequence[Tensor]:
        return parts if index is None else [part[:, index] for part in parts]


def _attend(
    processor: Any, attn: Any, image: Tensor, text: Tensor | None, rope: Any, rolling: Call
) -> tuple[Any, Tensor]:
    """Attention over [text, image, memory]: output, (image, text) in double blocks, and image queries before RoPE.

    In single blocks text is None, and image holds the text too, in front.
    """
    projections: Any = _get_qkv_projections(attn, image, text)  # type: ignore[arg-type]
    query, key, value = (x.unflatten(-1, (-1, attn.head_dim)) for x in projections[:3])
    image_query = query = attn.norm_q(query)
    key = attn.norm_k(key)
    if text is not None:
        q, k, v = (x.unflatten(-1, (-1, attn.head_dim)) for x in projections[3:])
        query = torch.cat([attn.norm_added_q(q), query], dim=1)
        key = torch.cat([attn.norm_added_k(k), key], dim=1)
        value = torch.cat([v, value], dim=1)
    query: Any = apply_rotary_emb(query, rope, sequence_dim=1)
    key: Any = apply_rotary_emb(key, rope, sequence_dim=1)

    rolling.kept.append((key[:, rolling.text_tokens :], value[:, rolling.text_tokens :]))
    if rolling.past is not None:
        key = torch.cat([key, rolling.past[0]], dim=1)
        value = torch.cat([value, rolling.past[1]], dim=1)
    mask = None if rolling.bias is None else rolling.bias.to(query.dtype)
    out = _dispatch(processor, query, key, value, mask)
    if text is None:
        return out, image_query
    text_out, image_out = out.tensor_split([rolling.text_tokens], dim=1)
    return (attn.to_out[1](attn.to_out[0](image_out.contiguous())), attn.to_add_out(text_out.contiguous())), image_query


def _dispatch(processor: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """(B, tokens, heads, dim) to (B, tokens, width), through the attention backend that diffusers was told to use."""
    options = {"backend": processor._attention_backend, "parallel_config": processor._parallel_config}
    return dispatch_attention_fn(query, key, value, attn_mask=mask, **options).flatten(2, 3).to(query.dtype)


class RollingFluxAttnProcessor(FluxAttnProcessor):
    """Attention over [text, image, memory]; without a rolling call, diffusers' own."""

    def __call__(
        self,
        attn,
        hidden_states,
        encoder_hidden_states=None,
        attention_mask=None,
        image_rotary_emb=None,
        rolling: Call | None = None,
    ):
        if rolling is None:
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)  # type: ignore[arg-type]
        return _attend(self, attn, hidden_states, encoder_hidden_states, image_rotary_emb, rolling)[0]


class RollingFluxIPAdapterAttnProcessor(FluxIPAdapterAttnProcessor):
    """The same with an IP-Adapter, whose tokens the image attends to apart from everything else."""

    def __call__(
        self,
        attn,
        hidden_states,
        encoder_hidden_states=None,
        attention_mask=None,
        image_rotary_emb=None,
        ip_hidden_states: Sequence[Tensor] = (),
        ip_adapter_masks=None,
        rolling: Call | None = None,
    ):
        if rolling is None:
            stock: Any = super().__call__
            return stock(
                attn,
                hidden_states,
                encoder_hidden_states,
                attention_mask,
                image_rotary_emb,
                ip_hidden_states,
                ip_adapter_masks,
            )
        outputs, query = _attend(self, attn, hidden_states, encoder_hidden_states, image_rotary_emb, rolling)
        adapted = torch.zeros_like(outputs[0])
        for tokens, scale, to_key, to_value in zip(ip_hidden_states, self.scale, self.to_k_ip, self.to_v_ip):
            key, value = (to(tokens).reshape(len(query), -1, *query.shape[2:]) for to in (to_key, to_value))
            adapted = adapted + scale * _dispatch(self, query, key, value)
        return *outputs, adapted


ROLLING_PROCESSORS = {
    FluxAttnProcessor: RollingFluxAttnProcessor,
    FluxIPAdapterAttnProcessor: RollingFluxIPAdapterAttnProcessor,
}


def _finite(x: Tensor) -> Tensor:
    return x.clip(-65504, 65504) if x.dtype == torch.float16 else x  # as diffusers does


class RollingFluxTransformerBlock(FluxTransformerBlock):
    """A double block whose image tokens stand at several noise levels; in a rolling call temb is (B, levels, width)."""

    def forward(
        self, hidden_states, encoder_hidden_states, temb, image_rotary_emb=None, joint_attention_kwargs=None
    ) -> tuple[Tensor, Tensor]:
        call: Call | None = joint_attention_kwargs.get("rolling") if joint_attention_kwargs else None
        if call is None or joint_attention_kwargs is None:
            return super().forward(hidden_states, encoder_hidden_states, temb, image_rotary_emb, joint_attention_kwargs)
        x, text = hidden_states, encoder_hidden_states
        shift, scale, gate, shift2, scale2, gate2 = call.image(self.norm1.linear, temb, 6)
        t = self.norm1_context.linear(F.silu(temb[:, :1])).chunk(6, dim=-1)  # same order, for the text
        attended, text_attended, *adapted = self.attn(  # the third: an IP-Adapter's part
            hidden_states=self.norm1.norm(x) * (1 + scale) + shift,
            encoder_hidden_states=self.norm1_context.norm(text) * (1 + t[1]) + t[0],
            image_rotary_emb=image_rotary_emb,
            **joint_attention_kwargs,
        )
        x = x + gate * attended
        x = x + gate2 * self.ff(self.norm2(x) * (1 + scale2) + shift2)
        x = x + adapted[0] if adapted else x
        text = text + t[2] * text_attended
        text = text + t[5] * self.ff_context(self.norm2_context(text) * (1 + t[4]) + t[3])
        return _finite(text), x


class RollingFluxSingleTransformerBlock(FluxSingleTransformerBlock):
    """A single block whose tokens stand at several noise levels; in a rolling call temb is (B, levels, width)."""

    def forward(
        self, hidden_states, encoder_hidden_states, temb, image_rotary_emb=None, joint_attention_kwargs=None
    ) -> tuple[Tensor, Tensor]:
        call: Call | None = joint_attention_kwargs.get("rolling") if joint_attention_kwargs else None
        if call is None or joint_attention_kwargs is None:
            return super().forward(hidden_states, encoder_hidden_states, temb, image_rotary_emb, joint_attention_kwargs)
        x = torch.cat([encoder_hidden_states, hidden_states], dim=1)
        shift, scale, gate = call.joint(self.norm.linear, temb, 3)
        y = self.norm.norm(x) * (1 + scale) + shift
        mlp = self.act_mlp(self.proj_mlp(y))
        attended = self.attn(hidden_states=y, image_rotary_emb=image_rotary_emb, **joint_attention_kwargs)
        x = _finite(x + gate * self.proj_out(torch.cat([attended, mlp], dim=2)))
        return x[:, : call.text_tokens], x[:, call.text_tokens :]


# diffusers' caches (first block, TaylorSeer, …) look blocks up by their exact class.
for _stock, _rolling in (
    (FluxTransformerBlock, RollingFluxTransformerBlock),
    (FluxSingleTransformerBlock, RollingFluxSingleTransformerBlock),
):
    _known = TransformerBlockRegistry.get(_stock)
    TransformerBlockRegistry.register(
        _rolling,
        TransformerBlockMetadata(
            return_hidden_states_index=_known.return_hidden_states_index,
            return_encoder_hidden_states_index=_known.return_encoder_hidden_states_index,
        ),
    )
