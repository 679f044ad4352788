"""FLUX.2: [dev], [klein]. One modulation serves all blocks of a kind, so their own forwards take levels as they are."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from diffusers.models.transformers.transformer_flux2 import Flux2AttnProcessor, Flux2ParallelSelfAttnProcessor
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu
from torch import Tensor

from .call import Call, Slot, embed_levels, forward, modulate_output, processor
from .family import Family
from .flux import Flux, pack


def _image(self: Any, temb: Tensor) -> Tensor:
    return self.rolling.image(type(self).forward(self, temb), 1)[0]


def _text(self: Any, temb: Tensor) -> Tensor:
    return self.rolling.text(type(self).forward(self, temb[:, : self.rolling.texts]), 1)[0]


def _both(self: Any, temb: Tensor) -> Tensor:
    return self.rolling.both(type(self).forward(self, temb), 1)[0]


def _block(self: Any, *args: Any, joint_attention_kwargs: dict | None = None, **options: Any) -> Any:
    """A block's own forward, whose attention is told of the layer."""
    told = {**(joint_attention_kwargs or {}), "attention_mask": self.rolling}
    return type(self).forward(self, *args, joint_attention_kwargs=told, **options)


MOST_TOKENS = 16384  # four megapixels, the largest picture that FLUX.2 was made for


class Flux2(Family):
    PROCESSORS = (Flux2AttnProcessor, Flux2ParallelSelfAttnProcessor)

    def most_shift(self, config: Any) -> float | None:
        return compute_empirical_mu(MOST_TOKENS, 50)  # above one megapixel it is the same for any number of steps

    cells, latents, blocks = Flux.cells, Flux.latents, Flux.blocks
    shifted, moved, turns, around, turned = Flux.shifted, Flux.moved, Flux.turns, Flux.around, Flux.turned

    def encode(self, pipe: Any, pixels: Tensor) -> Tensor:
        found = pipe.vae.encode(pixels.to(pipe.vae.device, pipe.vae.dtype)).latent_dist.mode()
        mean, deviation = self._norm(pipe, found)
        return (pack(found) - mean) / deviation

    @staticmethod
    def _norm(pipe: Any, like: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and deviation of the channels of a token."""
        norm = pipe.vae.bn
        return norm.running_mean.to(like), (norm.running_var + pipe.vae.config.batch_norm_eps).sqrt().to(like)

    def decode(self, pipe: Any, latents: Tensor, height: int, width: int) -> Tensor:
        mean, deviation = self._norm(pipe, latents)
        x = self.cells(latents * deviation + mean, height, width)
        return pipe.vae.decode(x.to(pipe.vae.dtype), return_dict=False)[0]

    def choose(self, request: dict[str, Any], tokens: Tensor, height: int, width: int) -> dict[str, Any]:
        x, ids = request["hidden_states"], request["img_ids"]
        if request.get("kv_cache_mode") is not None:
            raise ValueError("a cache of the references' keys cannot be combined with rolling: take Flux2KleinPipeline")
        tokens = self.with_references(tokens, request, height, width)
        return request | {"hidden_states": x[:, tokens], "img_ids": ids[..., tokens, :]}

    def swaps(self, model: Any, call: Call) -> Iterator[Slot]:
        yield forward(model.time_guidance_embed, embed_levels)
        for module, function in (
            (model.double_stream_modulation_img, _image),
            (model.double_stream_modulation_txt, _text),
            (model.single_stream_modulation, _both),
            (model.norm_out, modulate_output),
        ):
            yield vars(module), "rolling", call.plain
            yield forward(module, function)
        for block in self.blocks(model):
            yield vars(block), "rolling", call.attention()
            yield forward(block, _block)
            yield processor(block.attn)
