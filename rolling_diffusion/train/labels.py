"""Dense labels: what stands at every token, asked of the middle of the transformer while it learns to draw.

A representation that is taught beside the denoising loss makes diffusion transformers learn several times faster
(REPA, 2410.06940). There the teacher is a large vision model; here the world itself knows what it drew where. The
questions are thrown away after training: the model's parameters and its computation stay Flux's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..world.scene import COLOURS, KINDS, Scene
from .optimiser import autocast

TOKEN = 16  # pixels
KIND: list[str] = list(KINDS)
COLOUR: list[str] = list(COLOURS)


def labels(scenes: Sequence[Scene]) -> Tensor:
    """(B, tokens, 4) of scenes of one size: kind and colour (1 + index, 0 for none), and x, y of the token's centre
    from the object's, in radii."""
    height, width = scenes[0].height, scenes[0].width
    y, x = torch.meshgrid(torch.arange(height // TOKEN) + 0.5, torch.arange(width // TOKEN) + 0.5, indexing="ij")
    out = torch.zeros(len(scenes), height // TOKEN, width // TOKEN, 4)
    for canvas, scene in zip(out, scenes):
        for thing in scene.things:
            dx, dy = (x * TOKEN - thing.x) / thing.radius, (y * TOKEN - thing.y) / thing.radius
            inside = (dx.abs() < 1) & (dy.abs() < 1)
            what = torch.tensor([KIND.index(thing.kind) + 1.0, COLOUR.index(thing.colour) + 1.0])
            canvas[inside] = torch.cat([what.expand(int(inside.sum()), 2), dx[inside, None], dy[inside, None]], 1)
    return out.flatten(1, 2)


class Questions(nn.Module):
    """Reads the image tokens of a transformer's middle block through a hook, and is asked about them afterwards."""

    def __init__(self, transformer: Any) -> None:
        super().__init__()
        width = transformer.config.num_attention_heads * transformer.config.attention_head_dim
        self.head = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, len(KIND) + len(COLOUR) + 4)
        )
        blocks = transformer.single_transformer_blocks
        self.hook = blocks[len(blocks) // 2 - 1].register_forward_hook(self._listen)
        self.states = torch.empty(0)

    def _listen(self, module: nn.Module, arguments: tuple, output: tuple[Tensor, Tensor]) -> None:
        self.states = output[1]

    def forward(self, truth: Tensor, teach: bool = True) -> Tensor:
        """The mean error of the answers about the last call's tokens; truth (B, tokens, 4) as `labels` gives it.

        teach: whether the transformer learns from it, too.
        """
        states, self.states = self.states if teach else self.states.detach(), torch.empty(0)
        with autocast(states.device.type):
            answers = self.head(states).float()
        kind, colour, place = answers.split([len(KIND) + 1, len(COLOUR) + 1, 2], -1)
        loss = F.cross_entropy(kind.flatten(0, 1), truth[..., 0].long().flatten())
        loss = loss + F.cross_entropy(colour.flatten(0, 1), truth[..., 1].long().flatten())
        there = (truth[..., :1] > 0).float()
        return loss + ((place - truth[..., 2:]).square() * there).sum() / (2 * there.sum()).clamp(min=1)
