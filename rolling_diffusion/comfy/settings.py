"""What the nodes ask for, and the plan that it comes to on a model's canvas."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from ..core.order import Block, span
from ..core.plan import Plan
from ..defaults import Card, plan_for
from .notes import Notes

# Pixels a side of a cell where it is not 8, for ComfyUIs whose latent formats do not say.
PIXELS = {"LTXV": 32, "HunyuanImage21": 32, "SC_Prior": 42, "SC_B": 4, "ChromaRadiance": 1}


def cell_pixels(model: Any) -> int:
    """Pixels a side of one cell of this model's latents."""
    latent_format = model.latent_format
    return getattr(latent_format, "spacial_downscale_ratio", PIXELS.get(type(latent_format).__name__, 8))


@dataclass(frozen=True)
class Settings:
    """What the nodes ask for, in cells. draft -1, lookahead -1: FLUX.1-dev's default; memory_cap 0: no cap."""

    order: str = "top-to-bottom"
    window: int = 64
    overlap: int = 16
    persistence: float = 0.5
    draft: int = -1
    lookahead: int = -1
    context_noise: float = 0.0
    memory_cap: int = 0
    seed: int = 0
    extrapolation: float = 0.0

    def plan(
        self, height: int, width: int, steps: int, multiple: int = 1, pixels: int = 8, given: Sequence[Block] = ()
    ) -> Plan:
        """The plan for a canvas in the model's own cells, of `pixels` pixels a side; ValueError as plan_for's.

        Window, overlap and lookahead are asked for in cells of 8×8 pixels, so that they mean the same part of the
        picture on every model. The far edges of the canvas are rounded up to whole tokens.
        """
        if self.overlap >= self.window:
            raise ValueError(
                f"the overlap is {self.overlap} cells, and must be below the window, which is {self.window}."
            )

        def own(cells: int, least: int = 0) -> int:
            return max(round(cells * 8 / pixels / multiple) * multiple, least)

        window = own(self.window, multiple)
        return plan_for(
            Card(),
            -(-height // multiple) * multiple,
            -(-width // multiple) * multiple,
            steps,
            order=self.order,
            window=window,
            overlap=min(own(self.overlap), window - multiple),
            draft=None if self.draft < 0 else self.draft,
            lookahead="auto" if self.lookahead < 0 else own(self.lookahead),
            seed=self.seed % 2**63,
            multiple=multiple,
            persistence=self.persistence,
            extrapolation=self.extrapolation,
            given=given,
        )

    def fitted(self, height: int, width: int, notes: Notes) -> Settings:
        """Half of the canvas (cells) where the window would cover it; the overlap keeps its share of the window."""
        extent = span(self.order, height, width)
        window = max(extent // 4 * 2, 4)
        if self.window < extent or window >= extent:
            return self
        overlap = self.overlap * window // self.window // 2 * 2
        notes.tell(
            f"The window of {self.window} cells would cover the picture: it is fitted to {window} cells, overlapping "
            f"by {overlap}. Turn fit_window off for ordinary sampling."
        )
        return replace(self, window=window, overlap=overlap)

    def check(self, samples: Tensor, steps: int) -> None:
        """ValueError, one sentence, if no plan can be made for this latent: before any model is loaded."""
        if samples.ndim in (4, 5) and not getattr(samples, "is_nested", False):
            self.plan(samples.shape[-2], samples.shape[-1], steps)
