"""`rolling-diffusion plan`: what a plan costs, and what it looks like."""

from __future__ import annotations

import argparse
from dataclasses import asdict, replace
from pathlib import Path

from ..core.plan import Plan
from ..defaults import Card
from .arguments import Parser, whole_number
from .files import check_apart, check_target, save_json, save_png
from .model import EMBEDDED, locate
from .replay import record
from .settings import PLAN_DEFAULTS, add_plan_options, complete, fitted, plan_of

HEAD = ("", "calls", "tokens/call", "in motion", "visible", "evaluations", "of full")


def add_options(parser: Parser) -> None:
    add_plan_options(parser)
    add = parser.add_argument
    add("--model", default=EMBEDDED, metavar="MODEL", help="whose habits fill in what is not said (default: embedded)")
    add("--text-tokens", type=whole_number(0), metavar="N", help="of the prompt (default: the model's own)")
    add("-o", "--output", type=Path, metavar="FILE.png", help="a picture of the plan")
    add("--json", type=Path, metavar="FILE", help="the plan and its cost, for programs")


def run(values: argparse.Namespace) -> int:
    card = Card.in_folder(locate(values.model))
    settings = complete(values, {}, PLAN_DEFAULTS, card)
    plan = plan_of(settings, card)
    said = {name for name in settings if getattr(values, name, None) is not None}
    text_tokens = card.max_sequence_length if values.text_tokens is None else values.text_tokens
    if values.output is not None:
        check_target(values.output, (".png",))
    if values.json is not None:
        check_target(values.json)
    check_apart({"--output": values.output, "--json": values.json})
    print(describe(plan, text_tokens))
    if values.output is not None:
        from ..picture import plan_picture

        picture = plan_picture(plan, text_tokens=text_tokens)
        print(f"\n{save_png(values.output, picture, record(said, fitted(settings, plan, card)))}")
    if values.json is not None:
        save_json(values.json, {"plan": asdict(plan), "cost": asdict(plan.cost(text_tokens))})
    return 0


def describe(plan: Plan, text_tokens: int) -> str:
    """The plan in words, and its cost beside that of the same canvas sampled at once and block by block."""
    first = plan.blocks[0]
    reach = {None: "the whole canvas", 0: "nothing"}.get(plan.lookahead, f"{plan.lookahead} cells")
    ahead = f", extrapolated by {plan.extrapolation:g}" if plan.extrapolation and plan.lookahead != 0 else ""
    late = ", decided at the end of the draft" if plan.late else ""
    draft = "by the guide" if plan.first else "in the draft"
    lines = [
        f"canvas   {plan.width * 8} × {plan.height * 8} pixels = {plan.width} × {plan.height} cells",
        f"blocks   {len(plan.blocks)} of {first.width} × {first.height} cells, {plan.blocks.name}{late}",
        f"window   {plan.window} cells, overlap {plan.overlap}: at most {plan.capacity} blocks in motion",
        f"steps    {plan.steps} a block, {plan.draft} of them {draft}; lag {plan.lag} ticks",
        *(
            [f"guide    a picture of {plan.guide[1]} × {plan.guide[0]} cells in place of the draft"]
            if plan.guide
            else []
        ),
        f"memory   finished blocks at persistence {plan.persistence:g}, waiting blocks: {reach}{ahead}",
        "",
    ]
    rows = [HEAD, _row("this plan", plan, text_tokens)]
    rows += [_row(name, _with_lag(plan, lag), text_tokens) for name, lag in (("full", 0), ("autoregressive", None))]
    widths = [max(len(row[i]) for row in rows) for i in range(len(HEAD))]
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        lines.append("  ".join(cells))
    lines.append("")
    lines.append(f"Tokens include {text_tokens} of text in each call; evaluations are tokens computed in all calls.")
    return "\n".join(lines)


def _with_lag(plan: Plan, lag: int | None) -> Plan:
    return replace(plan, lag=plan.steps - plan.draft if lag is None else lag)


def _row(name: str, plan: Plan, text_tokens: int) -> tuple[str, ...]:
    cost = plan.cost(text_tokens)
    numbers = (
        cost.calls,
        round(cost.tokens_per_tick),
        cost.peak_moving_tokens,
        cost.peak_visible_tokens,
        cost.token_evaluations,
    )
    return (name, *(f"{number:,}" for number in numbers), f"{cost.relative:.2f} ×")
