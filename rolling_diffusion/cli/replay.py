"""What a picture records of how it was made, and what of that `generate --from` says again.

What was said stays apart from what was fitted to it: only what was said is said again, and all else is fitted anew. The
machine's own, device, dtype and offloading, are written down, and never said again. Files are recorded by their names
alone, and are looked for here and beside the picture.
"""

from __future__ import annotations

import argparse
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from .. import __version__
from ..recording import MACHINE
from ..recording import record as recorded
from .arguments import Parser
from .files import read_record
from .model import EMBEDDED, REPOSITORY, base_name, found
from .prompts import prompts_of

NAMES = ("model", "image", "mask", "picture")  # of files
# Pictures of version 0.1.0 recorded all settings as one, resolved. Of theirs, what may have been fitted to one of these
# is not said again where one of these is said anew.
WHOLE = {"model"}
CANVAS = {*WHOLE, "order", "width", "height"}
OLD = {
    "width": WHOLE,
    "height": WHOLE,
    "steps": WHOLE,
    "cfg": WHOLE,
    "draft": {*WHOLE, "steps"},
    "window": CANVAS,
    "overlap": {*CANVAS, "window"},
    "lookahead": {*CANVAS, "window"},
}


def record(said: Collection[str], settings: Mapping[str, Any]) -> dict[str, Any]:
    """What is kept in a picture. said: names of what the user said, now or for the picture before;
    settings: everything, resolved."""
    return recorded(__version__, said, {name: shown(name, value) for name, value in settings.items()})


def shown(name: str, value: Any) -> Any:
    """A setting as it is recorded: of a file, its name alone."""
    if name in NAMES and value is not None:
        return base_name(str(value))
    if name == "lora" and value:
        return [[base_name(file), strength] for file, strength in value]
    return value


def replayed(path: Path, values: argparse.Namespace, names: Collection[str]) -> dict[str, Any]:
    """What the picture at `path` says of the settings `names`, where `values` say nothing; ValueError if it cannot be
    used."""
    entries = read_record(path)
    anew = {name for name, value in vars(values).items() if value is not None}
    old = not isinstance(entries.get("said"), dict)
    if old:
        again = {name: value for name, value in entries.items() if not OLD.get(name, set()) & anew}
    else:
        again = entries["said"]
    return {
        name: _checked(path, name, value, values.parser)
        for name, value in again.items()
        if name in names and name not in {*MACHINE, *anew} and value is not None
    }


def changed(path: Path, values: argparse.Namespace, settings: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """What was fitted to the picture at `path` and is fitted otherwise now, by name, as (then, now).

    Nothing, where more than a seed or the machine was said anew: else the defaults have changed since.
    """
    then = read_record(path).get("fitted")
    if not isinstance(then, dict) or any(
        getattr(values, name, None) is not None for name in {*settings} - {"seed", *MACHINE}
    ):
        return {}
    now = {name: shown(name, value) for name, value in settings.items()}
    return {name: (old, now[name]) for name, old in then.items() if name in now and now[name] != old}


def _checked(path: Path, name: str, value: Any, parser: Parser) -> Any:
    """A recorded value, which is held to what its option allows, and a file's name, which is looked for."""
    action = next(action for action in parser._actions if action.dest == name)
    option = action.option_strings[0] if action.option_strings else name
    try:
        if name == "lora":
            return [(_found(path, option, file), strength) for file, strength in _loras(value)]
        if name == "prompts":
            return prompts_of(value, rectangles=True)
        if action.type not in (None, Path):
            return action.type(str(value))  # pyright: ignore[reportCallIssue]
        if not isinstance(value, str):
            raise ValueError("must be a text")
        return (action.type or str)(_found(path, option, value)) if name in NAMES else value
    except (argparse.ArgumentTypeError, ValueError) as error:
        shown = repr(value)[:60]
        raise ValueError(f"{path} cannot be used again: it records {name} = {shown}, and {option} {error}") from None


def _loras(value: Any) -> list[tuple[str, float]]:
    pairs = [pair for pair in value if isinstance(pair, list)] if isinstance(value, list) else []
    kinds = [[type(entry) for entry in pair] for pair in pairs]
    if not pairs or len(pairs) < len(value) or any(kind not in ([str, float], [str, int]) for kind in kinds):
        raise ValueError("takes names and strengths")
    return [(file, float(strength)) for file, strength in pairs]


def _found(path: Path, option: str, name: str) -> str:
    where = found(name, path.parent)
    if where is not None:
        return str(where)
    if name == EMBEDDED or (REPOSITORY.fullmatch(name) and option in ("--model", "--lora")):
        return name
    raise ValueError("must name a file that is here, or beside the picture: say it anew")
