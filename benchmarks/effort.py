"""`python -m benchmarks.effort`: hard blocks with more steps, easy ones with fewer; writes benchmarks/effort.md.

After a draft the half of the blocks about which the answers with and without the prompt differ most takes more steps
than the other half, so that a picture costs as many evaluations of a token as with equal steps for all. Every block
sees all others in each call, at their own levels of noise: nothing is lost to memory, so that what is gained here is
the most that rolling could gain. On the embedded model and the hard tasks; more than an hour on one core.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from rolling_diffusion import Card, load
from rolling_diffusion.core.difficulty import difficulty
from rolling_diffusion.core.order import make_order
from rolling_diffusion.evaluation import FAR, HARD
from rolling_diffusion.models.call import Levels, run
from rolling_diffusion.models.flux import Flux
from rolling_diffusion.world.score import Verdict, difference, interval, judge, make_prompts, more_invented

MODEL = Path(__file__).parent.parent / "rolling_diffusion" / "embedded"
SIDE, TILE = 32, 8  # cells: of the canvas, and of a block


@dataclass(frozen=True)
class Way:
    """draft: steps that all blocks take, of `steps` even ones; hard, easy: those that each half takes from there on.
    They move together, the easy half in longer strides."""

    steps: int
    draft: int
    hard: int
    easy: int

    @property
    def mean(self) -> float:
        """Steps of a block, on average."""
        return self.draft + (self.hard + self.easy) / 2

    def moves(self) -> list[tuple[bool, bool]]:
        """Who takes a step in each call after the draft: the hard half, and the easy one, which is never behind."""
        ahead = [-(-tick * self.easy // self.hard) for tick in range(self.hard + 1)]
        return [(True, now < then) for now, then in zip(ahead, ahead[1:])]


# Of few steps, where they tell, and of as many as the card says: prompts, their seed, and ways.
STUDIES: dict[str, tuple[int, int, dict[str, Way]]] = {
    "Of 6 steps": (
        240,
        31,
        {
            "6 for all": Way(6, 2, 4, 4),
            "2, then 6 hard and 2 easy": Way(6, 2, 6, 2),
            "8 for all": Way(8, 2, 6, 6),
            "4 of 8, then 2 longer ones for all": Way(8, 4, 2, 2),
            "4 of 8, then 3 hard and 1 easy": Way(8, 4, 3, 1),
        },
    ),
    "Of 20 steps": (120, 32, {"20 for all": Way(20, 5, 15, 15), "5, then 20 hard and 10 easy": Way(20, 5, 20, 10)}),
}


class Painter:
    """Pictures of the embedded model, one at a time: which blocks are hard is each picture's own."""

    def __init__(self) -> None:
        self.pipe = load(MODEL, None, "cpu")
        self.family, self.card = Flux(self.pipe.transformer), Card.in_folder(MODEL)
        blocks = make_order("raster", SIDE, SIDE, TILE, multiple=self.family.patch)
        self.blocks = [self.family.tokens(block, SIDE) for block in blocks[:]]
        self.everywhere = torch.arange((SIDE // self.family.patch) ** 2)

    @torch.no_grad()
    def latents(self, text: str, seed: int, way: Way) -> Tensor:
        """(1, tokens, channels), as FluxPipeline makes them with `way.steps`, where both halves take as many."""
        encode, size = self.pipe.encode_prompt, self.card.max_sequence_length
        texts = [encode(said, None, max_sequence_length=size) for said in (text, "")]
        draws = torch.Generator().manual_seed(seed)
        x, ids = self.pipe.prepare_latents(1, 16, 8 * SIDE, 8 * SIDE, torch.float32, torch.device("cpu"), draws)

        def ask(*levels: float, index: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
            answers = []
            for words, pooled, places in texts:
                request = {"hidden_states": x, "encoder_hidden_states": words, "pooled_projections": pooled}
                request |= {"img_ids": ids, "txt_ids": places}
                told = Levels.of(torch.tensor(levels), index)
                answers.append(run(self.family, self.pipe.transformer, request, self.everywhere, (SIDE, SIDE), told)[0])
            return answers[1] + self.card.cfg * (answers[0] - answers[1]), answers

        even = np.linspace(1, 0, way.steps + 1)
        answers: list[Tensor] = []
        for now, then in zip(even[: way.draft], even[1:]):
            velocity, answers = ask(self.level(now))
            x = x + (self.level(then) - self.level(now)) * velocity
        easy = self.easy(answers)
        ways = [[self.level(u) for u in np.linspace(even[way.draft], 0, steps + 1)] for steps in (way.hard, way.easy)]
        at = [0, 0]
        for moves in way.moves():
            levels = [of[i] for of, i in zip(ways, at)]
            same = levels[0] == levels[1]
            velocity, _ = ask(*levels[: 1 if same else 2], index=None if same else easy.long())
            strides = [of[i + moved] - of[i] for of, i, moved in zip(ways, at, moves)]
            x = x + torch.where(easy, strides[1], strides[0])[None, :, None] * velocity
            at = [i + moved for i, moved in zip(at, moves)]
        return x

    def level(self, u: float) -> float:
        """The level of noise after 1 - u of even steps, with the shift of the model's scheduler."""
        shift = self.pipe.scheduler.config.shift
        return float(shift * u / (1 + (shift - 1) * u))

    def easy(self, answers: Sequence[Tensor]) -> Tensor:
        """(tokens,): whether each is of the easier half."""
        told = difficulty(*([answer[:, block] for block in self.blocks] for answer in answers))
        easy = torch.zeros(len(self.everywhere), dtype=torch.bool)
        for g in sorted(range(len(told)), key=told.__getitem__)[: len(told) // 2]:
            easy[self.blocks[g]] = True
        return easy

    @torch.no_grad()
    def paint(self, text: str, seed: int, way: Way) -> np.ndarray:
        """(H, W, 3), uint8."""
        pixels = self.family.decode(self.pipe, self.latents(text, seed, way), SIDE, SIDE)[0]
        return ((pixels / 2 + 0.5).clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()


def row(name: str, way: Way, found: Sequence[Verdict], like: Sequence[Verdict]) -> str:
    """The line of a way; like: the verdicts of the first one."""
    right, count = sum(v.right for v in found), len(found)
    cells = [name, f"{way.mean:g}", "{:.3f} ({:.3f} to {:.3f})".format(right / count, *interval(right, count))]
    invented = f"{sum(v.invented for v in found) / max(1, sum(v.found for v in found)):.3f}"
    if found is like:
        cells += ["", invented]
    else:
        cells.append("{:+.3f} ({:+.3f} to {:+.3f})".format(*difference(found, like)))
        cells.append(invented + ", {:+.3f} ({:+.3f} to {:+.3f})".format(*more_invented(found, like)))
    return f"| {' | '.join(cells)} |"


def study(painter: Painter, title: str) -> list[str]:
    """The table of one study."""
    count, seed, ways = STUDIES[title]
    prompts, like = make_prompts(count, seed, HARD), []
    lines = ["", f"## {title}", f"{count} prompts.", ""]
    lines += ["| steps | on average | right | against the first | invented |", "| --- | --- | --- | --- | --- |"]
    for name, way in ways.items():
        told: Any = tqdm(prompts, name, leave=False, disable=None)
        found = [judge(p, painter.paint(p.text, FAR + i, way)) for i, p in enumerate(told)]
        like = like or found
        lines.append(row(name, way, found, like))
        print(lines[-1], flush=True)
    return lines


def main() -> None:
    painter = Painter()
    lines = [
        "# Hard blocks with more steps",
        "Written by `python -m benchmarks.effort`. The embedded model, four hard tasks, 16 blocks. The half about",
        "which the answers with and without the prompt differ most takes more steps than the other. All see each other",
        "in every call: the most that there is to gain. In float32.",
    ]
    for title in STUDIES:
        lines += study(painter, title)
    path = Path(__file__).parent / "effort.md"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"Written to {path}")


if __name__ == "__main__":
    main()
