"""Flux with a noise level per token range and with memory: diffusers' transformer, its parameters and its config."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from diffusers.utils import USE_PEFT_BACKEND, scale_lora_layers, unscale_lora_layers
from torch import Tensor
from torch.nn import functional as F

from ..core.memory import View
from ..defaults import check_text_level
from .blocks import (
    ROLLING_PROCESSORS,
    Call,
    RollingFluxSingleTransformerBlock,
    RollingFluxTransformerBlock,
)


class Keep(Protocol):
    """Takes keep[layer] = (key, value) of a call's image tokens, each (B, tokens, heads, dim). A dict will do."""

    def __setitem__(self, layer: int, kv: tuple[Tensor, Tensor], /) -> None: ...


class RollingFluxTransformer2DModel(FluxTransformer2DModel):
    """Flux with the parameters and the config of diffusers' class, a noise level per token range, and memory."""

    _no_split_modules = ["RollingFluxTransformerBlock", "RollingFluxSingleTransformerBlock"]  # noqa: RUF012
    _repeated_blocks = _no_split_modules

    @functools.wraps(FluxTransformer2DModel.__init__)  # diffusers reads the config's keys off the signature
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._become_rolling()

    @classmethod
    def from_stock(cls, model: FluxTransformer2DModel) -> RollingFluxTransformer2DModel:
        """Turn a loaded model into a rolling one in place: no weight is copied, LoRA layers and quantisation stay.

        Called with stock arguments it computes what it did before.
        """
        if isinstance(model, cls):
            return model
        blocks = [*model.transformer_blocks, *model.single_transformer_blocks]
        if any("forward" in vars(module) for module in (model, *blocks)):
            raise ValueError("The transformer carries offload or cache hooks; remove them (remove_all_hooks) first.")
        model.__class__ = cls
        assert isinstance(model, cls)
        model._become_rolling()
        return model

    def _become_rolling(self) -> None:
        for block in self.transformer_blocks:
            block.__class__ = RollingFluxTransformerBlock
        for block in self.single_transformer_blocks:
            block.__class__ = RollingFluxSingleTransformerBlock
        self._adopt_processors()

    def _attentions(self) -> list[Any]:
        return [block.attn for block in (*self.transformer_blocks, *self.single_transformer_blocks)]

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        pooled_projections: Tensor | None = None,
        timestep: Tensor | None = None,
        img_ids: Tensor | None = None,
        txt_ids: Tensor | None = None,
        guidance: Tensor | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
        controlnet_block_samples: Sequence[Tensor] | None = None,
        controlnet_single_block_samples: Sequence[Tensor] | None = None,
        return_dict: bool = True,
        controlnet_blocks_repeat: bool = False,
        *,
        ranges: Sequence[int] | Tensor | None = None,
        memory: View | None = None,
        keep: Keep | None = None,
        text_level: str = "max",
    ):
        """Stock arguments alone: the stock forward. With any of the following, a rolling call:

        ranges: image tokens at each noise level, in order (they add up to all), or a tensor (image tokens,) with the
            level of each; timestep then is (B, levels). None: one level, timestep (B,).
        memory: keys and values to attend to beside the call's own tokens.
        keep: keep[layer] = (key, value) of this call's image tokens, each (B, tokens, heads, dim), key after RoPE.
        text_level: the text's noise level: "max", "mean" or "min" of the sample's levels.
        """
        if ranges is None and memory is None and keep is None:
            stock: Any = super().forward  # its annotations deny the None that its defaults allow
            return stock(
                hidden_states=hidden_states,
                encoder_hidden_states=encoder_hidden_states,
                pooled_projections=pooled_projections,
                timestep=timestep,
                img_ids=img_ids,
                txt_ids=txt_ids,
                guidance=guidance,
                joint_attention_kwargs=joint_attention_kwargs,
                controlnet_block_samples=controlnet_block_samples,
                controlnet_single_block_samples=controlnet_single_block_samples,
                return_dict=return_dict,
                controlnet_blocks_repeat=controlnet_blocks_repeat,
            )
        if encoder_hidden_states is None or pooled_projections is None or timestep is None:
            raise ValueError("A rolling call needs encoder_hidden_states, pooled_projections and timestep.")
        if img_ids is None or txt_ids is None:
            raise ValueError("A rolling call needs img_ids and txt_ids, the positions of its tokens.")
        self._adopt_processors()
        index, timestep = self._levels(hidden_states, timestep, ranges, text_level)
        residuals = self._residuals(controlnet_block_samples, controlnet_single_block_samples, controlnet_blocks_repeat)
        options = dict(joint_attention_kwargs or {})
        if "ip_adapter_image_embeds" in options:
            project: Any = self.encoder_hid_proj
            options["ip_hidden_states"] = project(options.pop("ip_adapter_image_embeds"))
        lora_scale = options.pop("scale", 1.0)
        if USE_PEFT_BACKEND:
            scale_lora_layers(self, lora_scale)
        try:
            x, text = self.x_embedder(hidden_states), self.context_embedder(encoder_hidden_states)
            temb = self._embed(timestep, guidance, pooled_projections, x.dtype)
            rope = self.pos_embed(torch.cat((txt_ids, img_ids), dim=0))
            out = self._run(x, text, temb, rope, index, memory, keep, residuals, options)
        finally:
            if USE_PEFT_BACKEND:
                unscale_lora_layers(self, lora_scale)
        return Transformer2DModelOutput(sample=out) if return_dict else (out,)

    def _run(
        self,
        x: Tensor,
        text: Tensor,
        temb: Tensor,
        rope: Any,
        index: Tensor | None,
        memory: View | None,
        keep: Keep | None,
        residuals: dict[int, Tensor],
        options: dict[str, Any],
    ) -> Tensor:
        """Embedded image and text tokens (B, tokens, width) through all blocks to the output (B, tokens, channels)."""
        joint_index = None if index is None else F.pad(index + 1, (text.shape[1], 0))
        bias = None
        if memory is not None and memory.bias is not None:
            bias = F.pad(memory.bias, (text.shape[1] + x.shape[1], 0))[None, None, None]
        checkpoint: Any = self._gradient_checkpointing_func
        for i, block in enumerate((*self.transformer_blocks, *self.single_transformer_blocks)):
            past = None if memory is None else memory.layer(i)
            kept: list[tuple[Tensor, Tensor]] = []
            call = Call(text.shape[1], index, joint_index, past, bias, kept)
            arguments = x, text, temb, rope, {**options, "rolling": call}
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                text, x = checkpoint(block, *arguments)
            else:
                text, x = block(*arguments)
            if keep is not None:
                keep[i] = kept[0]
            if i in residuals:
                x = x + residuals[i]
        scale, shift = call.image(self.norm_out.linear, temb.to(x.dtype), 2)
        return self.proj_out(self.norm_out.norm(x) * (1 + scale) + shift)

    def _levels(
        self, x: Tensor, timestep: Tensor, ranges: Sequence[int] | Tensor | None, text_level: str
    ) -> tuple[Tensor | None, Tensor]:
        """The level of each image token (None: all share one), and timesteps (B, 1 + levels), the text's first."""
        check_text_level(text_level)
        if timestep.ndim == 1:
            timestep = timestep[:, None]
        if isinstance(ranges, Tensor):
            index = ranges
        else:
            counts = [x.shape[1]] if ranges is None else list(ranges)
            if len(counts) != timestep.shape[1] or sum(counts) != x.shape[1]:
                raise ValueError(
                    f"ranges {counts} do not fit {x.shape[1]} image tokens at {timestep.shape[1]} noise levels: "
                    "give one token count per column of timestep, adding up to the image tokens."
                )
            levels = torch.arange(len(counts), device=x.device)
            index = levels.repeat_interleave(torch.tensor(counts, device=x.device), output_size=x.shape[1])
        if timestep.shape[1] == 1:
            return None, timestep  # text and image share one row: exactly the stock computation
        if text_level == "mean":
            text = timestep.mean(1, keepdim=True)
        else:
            text = timestep.amax(1, keepdim=True) if text_level == "max" else timestep.amin(1, keepdim=True)
        return index, torch.cat([text, timestep], dim=1)

    def _embed(self, timestep: Tensor, guidance: Tensor | None, pooled: Tensor, dtype: torch.dtype) -> Tensor:
        """(B, levels) timesteps to (B, levels, width)."""
        batch, levels = timestep.shape
        scaled = [timestep.to(dtype).flatten() * 1000]
        if guidance is not None:
            scaled.append(guidance.to(dtype).repeat_interleave(levels) * 1000)
        return self.time_text_embed(*scaled, pooled.repeat_interleave(levels, dim=0)).unflatten(0, (batch, levels))

    def compile_repeated_blocks(self, *args, **kwargs):
        """diffusers' regional compilation, which meets about a dozen kinds of rolling calls: dynamic=True saves half.

        One level or several, memory or none, biased or not, the draft, and the blocks' two input strides.
        """
        import torch._dynamo

        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 32)
        super().compile_repeated_blocks(*args, **kwargs)

    def _adopt_processors(self) -> None:
        """Attention processors learn of memory in place, also those that loading an IP-Adapter has put there since."""
        for attention in self._attentions():
            kind = type(attention.processor)
            if kind in ROLLING_PROCESSORS:
                attention.processor.__class__ = ROLLING_PROCESSORS[kind]
            elif kind not in ROLLING_PROCESSORS.values():
                raise ValueError(f"The attention processor {kind.__name__} knows no memory; use FluxAttnProcessor.")

    def _residuals(
        self, double: Sequence[Tensor] | None, single: Sequence[Tensor] | None, repeat: bool
    ) -> dict[int, Tensor]:
        """ControlNet residuals by layer, spread over the layers as diffusers does."""
        residuals = {}
        n, m = len(self.transformer_blocks), len(self.single_transformer_blocks)
        if double is not None:
            stride = -(-n // len(double))
            residuals |= {i: double[i % len(double) if repeat else i // stride] for i in range(n)}
        if single is not None:
            stride = -(-m // len(single))
            residuals |= {n + i: single[i // stride] for i in range(m)}
        return residuals
