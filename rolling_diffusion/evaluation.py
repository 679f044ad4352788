"""Evaluation: the prompt-following score of several ways of sampling, on the same prompts and seeds."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .core.order import ROUTES
from .core.plan import Plan
from .defaults import CELL, Card, plan_for
from .world.score import (
    APART,
    TASKS,
    Prompt,
    Verdict,
    difference,
    illustrate,
    interval,
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
HARD = ("two objects", "counting", "colour binding", "relation")  # what `--study order` asks for
FAR = 1_000_000  # picture seeds start here, far from those that training used


def paint(
    pipe: Any, prompts: Sequence[Prompt], first: int, way: Mapping[str, Any], common: Mapping[str, Any]
) -> list[np.ndarray]:
    """One picture (H, W, 3), uint8, for each prompt; picture i is drawn from seed FAR + first + i."""
    options = {**common, **way}
    if _late(options) and len(prompts) > 1:  # an order that is each picture's own
        return [paint(pipe, [p], first + i, way, common)[0] for i, p in enumerate(prompts)]
    generators = [torch.Generator().manual_seed(FAR + first + i) for i in range(len(prompts))]
    images = pipe(prompt=[p.text for p in prompts], generator=generators, output_type="np", **options).images
    return [np.round(image * 255).astype(np.uint8) for image in np.asarray(images)]


def _late(options: Mapping[str, Any]) -> bool:
    return isinstance(options.get("order"), str) and options["order"] in ROUTES and ROUTES[options["order"]].late


class Work:
    """Verdicts that are there already, in a JSON-lines file: what was killed goes on where it was.

    A line holds the verdicts of some prompts, under a hash of all that they depend on. It is written whole, in one go;
    one that was cut short all the same is taken off. ValueError for a file that holds anything else.

    path: None keeps nothing. about: what all pictures depend on, such as the model.
    """

    def __init__(self, path: Path | None = None, about: Mapping[str, Any] | None = None):
        self.path, self.about = path, dict(about or {})
        self.lines: dict[str, dict[str, Any]] = {}
        if path is None or not path.exists():
            return
        whole = path.read_bytes()
        end = whole.rfind(b"\n") + 1
        for number, line in enumerate(whole[:end].splitlines(), 1):
            try:
                entry = json.loads(line)
                entry["verdicts"] = [Verdict(*verdict) for verdict in entry["verdicts"]]
                self.lines[entry["key"]] = entry
            except (ValueError, TypeError, KeyError):
                raise ValueError(f"line {number} of {path} is not evaluate's: name another file for the work") from None
        rest, begins = whole[end:], b'{"key": "'
        if rest and not (rest.startswith(begins) or begins.startswith(rest)):
            raise ValueError(f"the end of {path} is not evaluate's: name another file for the work")
        if rest:
            os.truncate(path, end)

    def key(self, prompts: Sequence[Prompt], first: int, options: Mapping[str, Any]) -> str:
        """Of these prompts, drawn in this way; `first` says with which seeds."""
        content = [self.about, first, [[p.task, p.text] for p in prompts], options]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]

    def add(self, key: str, verdicts: Sequence[Verdict], **more: Any) -> None:
        """Keeps verdicts; more: what a reader of the file may want to know."""
        entry = {"key": key, **more, "verdicts": verdicts}
        self.lines[key] = entry
        if self.path is None:
            return
        line = json.dumps(entry | {"verdicts": [astuple(v) for v in verdicts]}, ensure_ascii=False) + "\n"
        with open(self.path, "ab", buffering=0) as file:
            file.write(line.encode())
            os.fsync(file.fileno())


def judged(
    pipe: Any,
    prompts: Sequence[Prompt],
    name: str,
    way: Mapping[str, Any],
    common: Mapping[str, Any],
    batch: int,
    work: Work,
    done: Callable[[int], object] = lambda _: None,
) -> list[Verdict]:
    """A verdict for each prompt, of the work or of a picture that is drawn now. done: told how many there are."""
    verdicts: list[Verdict] = []
    for i in range(0, len(prompts), batch):
        some = prompts[i : i + batch]
        key = work.key(some, i, {**common, **way})
        if key not in work.lines:
            started = time.perf_counter()
            found = [judge(p, picture) for p, picture in zip(some, paint(pipe, some, i, way, common))]
            seconds = round(time.perf_counter() - started, 2)
            work.add(key, found, sampling=name, way=dict(way), first=i, seconds=seconds)
        verdicts += work.lines[key]["verdicts"]
        done(len(verdicts))
    return verdicts


def evaluate(
    pipe: Any,
    count: int = 240,
    seed: int = 0,
    *,
    ways: Mapping[str, Mapping[str, Any]] = WAYS,
    held_out: int = 0,
    batch: int = 8,
    common: Mapping[str, Any] | None = None,
    work: Work | None = None,
    progress: Callable[[str, int, int], object] | None = None,
) -> dict[str, dict[str, Any]]:
    """For each way of sampling: `summary` of the verdicts, and how far it lies above "full" on the same prompts.

    count: prompts over the six tasks; a sixth as many relations follow, and held_out compositions never trained.
    common: keyword arguments of every call of the pipeline, such as width, height and steps. work: what is there.
    """
    prompts = make_prompts(count, seed) + make_prompts(count // len(TASKS), seed + 1, APART[:1])
    prompts += make_prompts(held_out, seed + 2, APART[1:]) if held_out else []
    report: dict[str, dict[str, Any]] = {}
    reference: list[Verdict] | None = None
    for name, way in ways.items():
        tell = _telling(progress, name, len(prompts))
        verdicts = judged(pipe, prompts, name, way, common or {}, batch, work or Work(), tell)
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


def _telling(progress: Callable[[str, int, int], object] | None, name: str, total: int) -> Callable[[int], object]:
    return lambda done: None if progress is None else progress(name, done, total)


@dataclass(frozen=True)
class Row:
    """A way of sampling in the study of orders. decides: a default rests on it, so it is drawn for all prompts, else
    for a quarter. against: the names of its rows of full sampling: with equal steps, with equal evaluations."""

    name: str
    way: Mapping[str, Any]
    decides: bool = False
    against: tuple[str, ...] = ()


def order_study(card: Card, common: Mapping[str, Any], only: Sequence[str] = ()) -> list[Row]:
    """The rows of `--study order`, each after those that it is compared with; only: these, and those. ValueError for a
    name that there is not.

    Orders, lags and memories are compared after a draft of a quarter of the steps: after half of them everything is
    settled. Full sampling is drawn again with as many more steps as a row computes more tokens, and with each cfg.
    """
    steps = common.get("num_inference_steps", card.steps)

    def draft(share: float) -> int:
        return replace(card, draft=share).draft_steps(steps)

    quarter = {"draft": draft(0.25)}
    drafts = {draft(share): share in (0.1, 0.25, 0.5) for share in (0, 0.1, 0.25, 0.5, 0.75)}
    lags = [lag for lag in (1, 2) if lag < steps - draft(0.25)]
    tiles = ("left-to-right", "spiral-out", "spiral-in", "raster", "random", "difficulty")
    rows = [Row("rolling", {"draft": card.draft_steps(steps)}, True)]
    rows += [Row(f"draft of {first}", {"draft": first}, decides) for first, decides in drafts.items()]
    rows += [Row(name, {**quarter, "order": name}) for name in tiles]
    rows += [Row(f"lag {lag}", {**quarter, "lag": lag}) for lag in (*lags, "autoregressive")]
    rows += [Row(f"extrapolation {x}", {**quarter, "extrapolation": x}, x == 0.4) for x in (0.2, 0.4, 0.7)]
    rows += [Row("difficulty, extrapolation 0.4", {**quarter, "order": "difficulty", "extrapolation": 0.4})]
    rows += [Row(f"persistence {p}", {**quarter, "attention_persistence": p}) for p in (0.5, 0.0)]
    rows += [Row(f"text at {level} level", {**quarter, "text_level": level}) for level in ("mean", "min")]
    own = common.get("cfg", card.cfg)
    if own is not None:
        rows += [Row(f"cfg {cfg:g}", {**quarter, "cfg": cfg}) for cfg in (own - 1, own + 1.5) if cfg > 1]
    rows = [row for row in rows if not _late(row.way) or row.way["draft"] > 1]
    if not quarter["draft"]:
        rows = [row for row in rows if "extrapolation" not in row.way]
    full: dict[str, Row] = {"full": Row("full", {"lag": 0}, True)}
    study: list[Row] = []
    for row in rows:
        guided = {"cfg": row.way["cfg"]} if "cfg" in row.way else {}
        equal = max(steps, round(steps * plan_of(card, {**common, **row.way}).cost(card.max_sequence_length).relative))
        names = []
        for many in dict.fromkeys((steps, equal)):
            name = "full" + (f", cfg {row.way['cfg']:g}" if guided else "") + (f", {many} steps" * (many != steps))
            more = {"num_inference_steps": many} if many != steps else {}
            decides = row.decides or (name in full and full[name].decides)
            full[name] = Row(name, {"lag": 0, **guided, **more}, decides)
            names.append(name)
        study.append(Row(row.name, row.way, row.decides, (names[0], names[-1])))
    every = [*full.values(), *study]
    wanted = {name for row in every if row.name in only for name in (row.name, *row.against)}
    for name in only:
        if name not in wanted:
            raise ValueError(f"the study has no row {name!r}: it has {', '.join(row.name for row in every)}")
    return [row for row in every if row.name in wanted or not only]


def plan_of(card: Card, options: Mapping[str, Any]) -> Plan:
    """The plan of a pipeline's call with these arguments."""
    names = {"attention_persistence": "persistence"}
    taken = ("order", "window", "overlap", "attention_persistence", "draft", "lookahead", "lag", "extrapolation")
    height, width = (options.get(side, card.size) // CELL for side in ("height", "width"))
    said = {names.get(name, name): options[name] for name in taken if name in options}
    return plan_for(card, height, width, options.get("num_inference_steps", card.steps), **said)


def pace(pipe: Any, prompts: Sequence[Prompt], common: Mapping[str, Any]) -> float:
    """Seconds that a picture of full sampling takes here, of a batch of these prompts: drawn now, in a few steps."""
    steps = common.get("num_inference_steps", pipe.card.steps)
    few = min(2, steps)
    for _ in range(2):  # the first one warms up
        started = time.perf_counter()
        paint(pipe, prompts, 0, {"lag": 0, "num_inference_steps": few}, common)
        seconds = time.perf_counter() - started
    return seconds / few * steps / len(prompts)


class OrderStudy:
    """The study of orders on prompts of the hard tasks: rows as of `order_study`, drawn one after the other.

    count: prompts of the rows that decide; the first quarter of them are those of the others.
    """

    def __init__(
        self,
        pipe: Any,
        rows: Sequence[Row],
        count: int,
        seed: int,
        *,
        batch: int = 8,
        common: Mapping[str, Any] | None = None,
        work: Work | None = None,
    ):
        self.pipe, self.batch, self.common, self.work = pipe, batch, common or {}, work or Work()
        self.rows, self.prompts = rows, make_prompts(count, seed, HARD)

    def prompts_of(self, row: Row) -> list[Prompt]:
        quarter = max(1, len(self.prompts) // (4 * len(HARD))) * len(HARD)
        return self.prompts if row.decides else self.prompts[:quarter]

    def relative(self, row: Row) -> float:
        """Tokens computed for a picture, against full sampling with the common steps."""
        options = {**self.common, **row.way}
        steps = self.common.get("num_inference_steps", self.pipe.card.steps)
        cost = plan_of(self.pipe.card, options).cost(self.pipe.card.max_sequence_length)
        return cost.relative * options.get("num_inference_steps", steps) / steps

    def left(self) -> tuple[int, float]:
        """Pictures that are not there yet, and their work, in pictures of full sampling."""
        missing: dict[str, tuple[int, float]] = {}
        for row in self.rows:
            prompts = self.prompts_of(row)
            for i in range(0, len(prompts), self.batch):
                some = prompts[i : i + self.batch]
                key = self.work.key(some, i, {**self.common, **row.way})
                if key not in self.work.lines:  # two rows may be one way
                    missing[key] = len(some), len(some) * self.relative(row)
        return sum(count for count, _ in missing.values()), sum(units for _, units in missing.values())

    def run(self, progress: Callable[[str, int, int], object] | None = None) -> dict[str, dict[str, Any]]:
        """For each row: right answers and invented objects, with 95 % intervals, and against its rows of full sampling,
        of the same prompts and seeds."""
        found: dict[str, list[Verdict]] = {}
        report: dict[str, dict[str, Any]] = {}
        for row in self.rows:
            prompts = self.prompts_of(row)
            tell = _telling(progress, row.name, len(prompts))
            own = found[row.name] = judged(
                self.pipe, prompts, row.name, row.way, self.common, self.batch, self.work, tell
            )
            right, seen = [v.right for v in own], sum(v.found for v in own)
            tasks = [t for t in HARD if any(v.task == t for v in own)]
            entry = report[row.name] = {
                "way": dict(row.way),
                "pictures": len(own),
                "evaluations": self.relative(row),
                "right": sum(right) / len(right),
                "interval": interval(sum(right), len(right)),
                "tasks": {t: float(np.mean([v.right for v in own if v.task == t])) for t in tasks},
                "invented": sum(v.invented for v in own) / max(1, seen),
            }
            for what, name in zip(("equal steps", "equal evaluations"), row.against):
                other = found[name][: len(own)]
                entry[what] = {"row": name, "difference": difference(own, other), "invented": more_invented(own, other)}
        return report


def order_table(report: Mapping[str, Mapping[str, Any]]) -> str:
    """The report of the study of orders as a Markdown table."""
    rows = [["sampling", "pictures", "evaluations", "right", "against full, equal steps",
             "against full, equal evaluations", "invented, against full", *HARD]]  # fmt: skip
    for name, row in report.items():
        cells = [name, str(row["pictures"]), f"{row['evaluations']:.2f}"]
        cells.append("{:.3f} ({:.3f} to {:.3f})".format(row["right"], *row["interval"]))
        for what in ("equal steps", "equal evaluations"):
            cells.append("{:+.3f} ({:+.3f} to {:+.3f})".format(*row[what]["difference"]) if what in row else "")
        invented = f"{row['invented']:.3f}"
        if "equal steps" in row:
            invented += ", {:+.3f} ({:+.3f} to {:+.3f})".format(*row["equal steps"]["invented"])
        rows.append([*cells, invented, *(f"{row['tasks'][t]:.2f}" if t in row["tasks"] else "" for t in HARD)])
    return _markdown(rows)


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
    return _markdown(rows)


def _markdown(rows: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows)]
    rows.insert(1, ["-" * width for width in widths])
    return "\n".join("| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in rows)
