"""What the transformer is told beside the canvas: embeddings of prompts and of images, a set for each branch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .guidance import Guidance


@dataclass(frozen=True)
class Prompt:
    """A prompt as FluxPipeline takes it: words for CLIP and for T5, or embeddings (B, tokens, width) and (B, width)."""

    words: Any = None
    words_2: Any = None
    embeds: Tensor | None = None
    pooled: Tensor | None = None

    @property
    def given(self) -> bool:
        return self.words is not None or (self.embeds is not None and self.pooled is not None)

    @property
    def says(self) -> bool:
        """Is it given, and not empty?"""
        texts = [self.words] if isinstance(self.words, str) else self.words or ()
        return any(text.strip() for text in texts) or (self.given and self.words is None)


def encode_prompts(
    pipe: Any, prompt: Prompt, negative: Prompt, guidance: Guidance, batch: int, encode: dict[str, Any]
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Embeddings (B, tokens, width), pooled ones (B, width) and positions (tokens, 3) of each branch, one or two."""
    prompts = [prompt]
    if guidance.scale > 1 and negative.given:
        if isinstance(negative.words, str) and batch > 1:
            negative = Prompt([negative.words] * batch, negative.words_2, negative.embeds, negative.pooled)
        shapes = [tuple(p.embeds.shape) for p in (prompt, negative) if p.embeds is not None]
        if len(set(shapes)) == 2:
            raise ValueError(
                f"prompt_embeds {shapes[0]} and negative_prompt_embeds {shapes[1]} must have the same shape "
                "when passed directly"
            )
        prompts.append(negative)
    return [
        pipe.encode_prompt(
            prompt=p.words, prompt_2=p.words_2, prompt_embeds=p.embeds, pooled_prompt_embeds=p.pooled, **encode
        )
        for p in prompts
    ]


def encode_images(
    pipe: Any, images: Sequence[Any], embeds: Sequence[Any], size: tuple[int, int], batch: int, device: torch.device
) -> list[list[Tensor] | None]:
    """IP-Adapter embeddings for the positive and the negative branch, from two images or two lists of embeddings.

    As FluxPipeline has it: where only one of the branches is given any, the other looks at a black image.
    """
    given = [image is not None or embed is not None for image, embed in zip(images, embeds)]
    if not any(given):
        return [None, None]
    if pipe.transformer.encoder_hid_proj is None:
        raise ValueError("ip_adapter_image needs an IP-Adapter: call load_ip_adapter first")
    black = [np.zeros((*size, 3), dtype=np.uint8)] * pipe.transformer.encoder_hid_proj.num_ip_adapters
    return [
        pipe.prepare_ip_adapter_image_embeds(image if there else black, embed, device, batch)
        for there, image, embed in zip(given, images, embeds)
    ]
