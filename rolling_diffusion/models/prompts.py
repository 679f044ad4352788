"""Several prompts in one call: all their words are there, and each part of the canvas attends to its own.

A bias on the attention logits says who sees what: image tokens see the words of a prompt with the weight that it has at
their place, and those words see the image likewise; words of two prompts never see each other, and image tokens always
do. What a model takes of a prompt as a whole, its pooled embedding, reaches the tokens where that prompt weighs most.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Prompts:
    """weights: (prompts, image tokens of the call), from 0 to 1; memory: the same of the tokens that memory shows.
    pooled: each prompt's (B, width); None where a model takes none."""

    weights: Tensor
    memory: Tensor | None
    pooled: list[Tensor] | None

    @property
    def owner(self) -> Tensor:
        """(image tokens,) the prompt that weighs most."""
        return self.weights.argmax(0)

    def bias(self, text: int, refs: int, text_first: bool, memory: Tensor | None) -> Tensor:
        """(1, 1, queries, keys), added to the logits of a call with `text` tokens of text, all prompts' alike, and
        `refs` references behind the image; memory: (tokens,), what is added for those in memory."""
        count, device = len(self.weights), self.weights.device
        words = torch.arange(count, device=device).repeat_interleave(text // count)
        own = torch.zeros(count, text, device=device).masked_fill_(
            words != torch.arange(count, device=device)[:, None], -torch.inf
        )[words]
        seen = F.pad(self.weights.log(), (0, refs))  # references belong to all
        to_image, to_words = seen[words], seen.T[:, words]
        between = torch.zeros(seen.shape[1], seen.shape[1], device=device)
        rows = [[own, to_image], [to_words, between]] if text_first else [[between, to_words], [to_image, own]]
        if self.memory is not None:
            past = self.memory.log()[words], torch.zeros(seen.shape[1], self.memory.shape[1], device=device)
            for row, more in zip(rows, past if text_first else past[::-1]):
                row.append(more if memory is None else more + memory)
        return torch.cat([torch.cat(row, 1) for row in rows])[None, None]


def spread(maps: Tensor, soft: int) -> Tensor:
    """(prompts, rows, columns) of 0 and 1, to weights that change over so many tokens at their borders."""
    if soft < 2:
        return maps
    size = soft // 2 * 2 + 1
    side = [min(size, n // 2 * 2 - 1) if n > 1 else 1 for n in maps.shape[1:]]
    pad = [n // 2 for n in side]
    mean = F.avg_pool2d(maps[None], side, 1, (pad[0], pad[1]), count_include_pad=False)[0]
    return mean / mean.sum(0)
