"""Evaluation: the prompt-following score of several ways of sampling, on the same prompts and seeds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from .world.score import (
    APART,
    TASKS,
    Prompt,
    Verdict,
    difference,
    illustrate,
    judge,
    make_prompts,
    more_invented,
    summary,
)

# What `rolling-diffusion evaluate` compares: keyword arguments of the pipeline.
WAYS: dict[str, dict[str, Any]] = {
    "full": {"lag": 0},
    "rolling": {},
    "autoregressive": {"lag": "autoregressive"},
}
# `--study memory`: each memory on and off where it counts most, at the largest lag.
MEMORY: dict[str, dict[str, Any]] = {
    "full": WAYS["full"],
    "autoregressive": WAYS["autoregressive"],
    "autoregressive, finished only": {"lag": "autoregressive", "lookahead": 0},
    "autoregressive, waiting only": {"lag": "autoregressive", "attention_persistence": 0.0},
    "autoregressive, no memory": {"lag": "autoregressive", "lookahead": 0, "attention_persistence": 0.0},
}
# `--study all`: also when rolling; lags, drafts (ticks of 20 steps), the noise levels of the text and of memory.
STUDY: dict[str, dict[str, Any]] = {
    **WAYS,
    "rolling, finished only": {"lookahead": 0},
    "rolling, waiting only": {"attention_persistence": 0.0},
    "rolling, no memory": {"lookahead": 0, "attention_persistence": 0.0},
    **MEMORY,
    "rolling, lag 2": {"lag": 2},
    "rolling, lag 4": {"lag": 4},
    "rolling, no draft": {"draft": 0},
    "rolling, draft of 50 %": {"draft": 10},
    "rolling, text at mean level": {"text_level": "mean"},
    "rolling, text at least level": {"text_level": "min"},
    "rolling, context noise 0.05": {"context_noise": 0.05},
    "rolling, spiral-out": {"order": "spiral-out"},
}
FAR = 1_000_000  # picture seeds start here, far from those that training used


def paint(
    pipe: Any, prompts: Sequence[Prompt], first: int, way: Mapping[str, Any], common: Mapping[str, Any]
) -> list[np.ndarray]:
    """One picture (H, W, 3), uint8, for each prompt; picture i is drawn from seed FAR + first + i."""
    generators = [torch.Generator().manual_seed(FAR + first + i) for i in range(len(prompts))]
    images = pipe(prompt=[p.text for p in prompts], generator=generators, output_type="np", **{**common, **way}).images
    return [np.round(image * 255).astype(np.uint8) for image in np.asarray(images)]


def evaluate(
    pipe: Any,
    count: int = 240,
    seed: int = 0,
    *,
    ways: Mapping[str, Mapping[str, Any]] = WAYS,
    held_out: int = 0,
    batch: int = 8,
    common: Mapping[str, Any] | None = None,
    progress: Callable[[str, int, int], object] | None = None,
) -> dict[str, dict[str, Any]]:
    """For each way of sampling: `summary` of the verdicts, and how far it lies above "full" on the same prompts.

    count: prompts over the six tasks; a sixth as many relations follow, and held_out compositions never trained.
    common: keyword arguments of every call of the pipeline, such as width, height and steps.
    """
    prompts = make_prompts(count, seed) + make_prompts(count // len(TASKS), seed + 1, APART[:1])
    prompts += make_prompts(held_out, seed + 2, APART[1:]) if held_out else []
    report: dict[str, dict[str, Any]] = {}
    reference: list[Verdict] | None = None
    for name, way in ways.items():
        verdicts: list[Verdict] = []
        for i in range(0, len(prompts), batch):
            some = prompts[i : i + batch]
            pictures = paint(pipe, some, i, way, common or {})
            verdicts += [judge(p, picture) for p, picture in zip(some, pictures)]
            if progress is not None:
                progress(name, len(verdicts), len(prompts))
        report[name] = summary(verdicts)
        main = [v for v in verdicts if v.task in TASKS]
        if name == "full":
            reference = main
        if reference is not None:
            report[name]["against full"] = difference(main, reference)
            report[name]["invented against full"] = more_invented(main, reference)
    return report


@torch.no_grad()
def ceiling(pipe: Any, count: int, seed: int = 0, *, batch: int = 8) -> dict[str, dict[str, Any]]:
    """What no sampling can exceed: `summary` of the renderer's own pictures, and of them once decoded.

    count: prompts over all tasks. pipe: one whose `vae` is made for such pictures.
    """
    vae, rng = pipe.vae, np.random.default_rng([seed, 8])
    prompts = make_prompts(count, seed, (*TASKS, *APART))
    pictures = [illustrate(prompt, rng) for prompt in prompts]
    decoded: list[np.ndarray] = []
    for i in range(0, count, batch):
        x = torch.from_numpy(np.stack(pictures[i : i + batch])).permute(0, 3, 1, 2).to(vae.device, vae.dtype)
        told = vae.encode(x / 127.5 - 1)
        y = vae.decode(told.latents if hasattr(told, "latents") else told.latent_dist.mode()).sample
        y = (y.float().clamp(-1, 1) + 1) * 127.5
        decoded += list(y.round().byte().permute(0, 2, 3, 1).cpu().numpy())
    ways = {"rendered": pictures, "and decoded": decoded}
    return {name: summary([judge(p, x) for p, x in zip(prompts, way)]) for name, way in ways.items()}


def table(report: Mapping[str, Mapping[str, Any]]) -> str:
    """The report as a Markdown table: scores, differences from full (95 % intervals), invented objects, tasks."""
    tasks = [t for t in (*TASKS, *APART) if any(t in row["tasks"] for row in report.values())]
    rows = [["sampling", "score", "against full", "invented", *tasks]]
    for name, row in report.items():
        score = "{:.3f} ({:.3f} to {:.3f})".format(row["score"], *row["interval"])
        gap = "{:+.3f} ({:+.3f} to {:+.3f})".format(*row["against full"]) if "against full" in row else ""
        invented = f"{row['invented']:.3f}"
        if "invented against full" in row:
            invented += ", {:+.3f} ({:+.3f} to {:+.3f})".format(*row["invented against full"])
        rows.append([name, score, gap, invented, *(f"{row['tasks'][t]:.2f}" for t in tasks)])
    widths = [max(map(len, column)) for column in zip(*rows)]
    rows.insert(1, ["-" * width for width in widths])
    return "\n".join("| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in rows)
