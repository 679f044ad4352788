"""Files of prompts: each line says what one picture is to be, in a text, a table or an object; or along a canvas."""

from __future__ import annotations

import argparse
import csv
import json
import math
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from .arguments import Parser, nearest
from .model import found

SUFFIXES = (".jsonl", ".csv", ".txt")
PICTURES = ("image", "mask")
Rectangle = tuple[int, int, int, int]  # left, top, right, bottom
Prompts = list[str] | list[tuple[int | float | Rectangle, str]]


def add_prompts(parser: Parser, of: str) -> None:
    """PROMPT and --prompts. of: what --prompts hold for parts of."""
    parser.add_argument("prompt", nargs="?", metavar="PROMPT", help="what to draw, in quotes")
    several = f"of parts of {of}: one a line (.txt), or a list with places (.json)"
    parser.add_argument("--prompts", type=Path, metavar="FILE", help=several)


def take_prompts(values: argparse.Namespace, again: dict[str, Any], rectangles: bool = False) -> dict[str, Any]:
    """`again`, what a picture records, less the prompts that were said otherwise; of `values`, the file is read."""
    if values.prompts is not None and values.prompt is not None:
        raise ValueError("PROMPT is for all of the canvas, and --prompts are for its parts: say one of them")
    if isinstance(values.prompts, Path):
        values.prompts_file = values.prompts
        values.prompts = read_prompts(values.prompts, rectangles)
    anew = {"prompt", "prompts"} if values.prompts is not None or values.prompt is not None else set()
    return {name: value for name, value in again.items() if name not in anew}


def check_said(said: Mapping[str, Any], example: str) -> None:
    """ValueError without a prompt."""
    if not said.get("prompts") and not said.get("prompt", "").strip():
        raise ValueError(f"a prompt is needed: {example}")


def texts_of(settings: Mapping[str, Any]) -> list[str]:
    """Every prompt that is said, once."""
    entries = settings["prompts"] or [settings["prompt"]]
    return list(dict.fromkeys(entry if isinstance(entry, str) else entry[1] for entry in entries))


def shared_out(prompts: Prompts) -> list[tuple[Any, str]]:
    """Prompts with places: those without share the canvas evenly."""
    return [(number / len(prompts), entry) if isinstance(entry, str) else entry for number, entry in enumerate(prompts)]


class Wrong(ValueError):
    """What is wrong with a line, and what stands there as its prompt."""

    def __init__(self, sentence: str, prompt: Any):
        super().__init__(sentence)
        self.prompt = prompt


def read_lines(path: Path, parser: Parser, names: Collection[str]) -> Iterator[tuple[int, dict[str, Any] | ValueError]]:
    """The number of each line, from 1, with what it says of the settings `names`, or what is wrong with it.

    A .txt has a prompt a line; a .csv names its columns in the first; a .jsonl has an object a line. What is empty or
    null is not said. ValueError, if the file as a whole cannot be used.
    """
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise ValueError(f"{path} must end in {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}")
    options = {a.dest: a.type for a in parser._actions if a.option_strings and a.dest != "help"}
    entries = {".jsonl": _objects, ".csv": _table, ".txt": _texts}[suffix]
    try:
        # What is no UTF-8 is kept, so that the line it stands in can be named, and the others drawn.
        with open(
            path, encoding="utf-8-sig", errors="surrogateescape", newline="" if suffix == ".csv" else None
        ) as file:
            for number, entry in entries(file):
                if isinstance(entry, dict):
                    entry = {name.replace("-", "_"): value for name, value in entry.items() if value not in (None, "")}
                    try:
                        entry = {
                            name: _checked(name, value, options, names, path.parent) for name, value in entry.items()
                        }
                        if "prompt" not in entry:
                            raise ValueError("it has no prompt")
                    except ValueError as error:
                        yield number, Wrong(str(error), entry.get("prompt"))
                        continue
                yield number, entry
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None


def read_prompts(path: Path, rectangles: bool = False) -> Prompts:
    """The prompts along a canvas, of a .txt, a prompt a line, or a .json, as `prompts_of` takes them; ValueError if
    they cannot be used."""
    suffix = path.suffix.lower()
    if suffix not in (".txt", ".json"):
        raise ValueError(f"{path} must end in .txt, with a prompt a line, or .json")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path} is no text in UTF-8") from None
    if suffix == ".txt":
        entries: Any = [line.strip() for line in text.splitlines() if line.strip()]
    else:
        try:
            entries = json.loads(text)
        except (ValueError, RecursionError):
            raise ValueError(f"{path} is not valid JSON") from None
    try:
        return prompts_of(entries, rectangles)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def prompts_of(entries: Any, rectangles: bool = False) -> Prompts:
    """Prompts, or pairs of a place and a prompt, a place being pixels or a share of the length, or, where there may be
    rectangles, four pixels; else ValueError."""
    if not isinstance(entries, list) or not entries:
        raise ValueError("prompts must be a list, with one at least")
    placed = not isinstance(entries[0], str)
    found: list[Any] = []
    for number, entry in enumerate(entries, 1):
        place, prompt = entry if isinstance(entry, list) and len(entry) == 2 else (0, entry)
        if isinstance(entry, list) != placed or not isinstance(prompt, str) or not prompt.strip():
            kinds = (
                '[PLACE, "words"]' if placed and number > 1 else '"words"' if number > 1 else "words, or [PLACE, words]"
            )
            raise ValueError(f"prompt {number} is {json.dumps(entry)[:60]}, and must be {kinds}")
        if rectangles and isinstance(place, list) and len(place) == 4 and all(type(n) is int for n in place):
            place = tuple(place)
        elif isinstance(place, bool) or not isinstance(place, (int, float)) or place != place or abs(place) == math.inf:
            kinds = "pixels, a share, or [left, top, right, bottom]" if rectangles else "pixels or a share"
            raise ValueError(f"the place of prompt {number} is {json.dumps(place)[:60]}, and must be {kinds}")
        found.append((place, prompt) if placed else prompt)
    return found


def _texts(file: Any) -> Iterator[tuple[int, dict[str, Any] | ValueError]]:
    for number, line in enumerate(file, 1):
        if line.strip():
            yield number, {"prompt": line.strip()}


def _objects(file: Any) -> Iterator[tuple[int, dict[str, Any] | ValueError]]:
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            yield number, ValueError("it is not valid JSON")
            continue
        wrong = ValueError('it must be an object, such as {"prompt": "a red ball"}')
        yield number, entry if isinstance(entry, dict) else wrong


def _table(file: Any) -> Iterator[tuple[int, dict[str, Any] | ValueError]]:
    reader = csv.reader(file)
    columns = None
    while True:
        number = reader.line_num + 1  # a row may take several lines: it is named by its first
        try:
            row = next(reader, None)
        except csv.Error as error:
            if columns is None:
                raise ValueError(f"{file.name} is not a table: {error}") from None
            yield number, ValueError(f"it is no row of a table: {error}")
            continue
        if row is None:
            break
        if columns is None:
            columns = [name.strip() for name in row]
            if "prompt" not in columns:
                raise ValueError(f"{file.name} must name its columns in the first line, and one of them prompt")
        elif len(row) > len(columns):
            yield number, ValueError(f"it has {len(row)} cells, and there are {len(columns)} columns")
        elif any(cell.strip() for cell in row):
            yield number, dict(zip(columns, row))


def _checked(name: str, value: Any, options: Mapping[str, Any], names: Collection[str], folder: Path) -> Any:
    """A value, held to what the option of that name allows; ValueError if it cannot be said in a line."""
    if name not in names and name not in ("prompt", *options):
        raise ValueError(f"it knows no {name!r}{nearest(name, names)}: choose from {', '.join(names)}")
    if name not in names:
        raise ValueError(f"{name} is for all pictures: say it as --{name.replace('_', '-')}, and not in a line")
    if isinstance(value, (list, dict, bool)) or (name not in options and not isinstance(value, str)):
        raise ValueError(f"its {name} is {json.dumps(value)[:60]}, and must be a text or a number")
    kind = options.get(name)
    try:
        if name in PICTURES:
            place = found(str(value), folder)
            return str((place or Path(str(value))).resolve())
        return kind(str(value)) if callable(kind) else str(value)
    except (argparse.ArgumentTypeError, ValueError) as error:
        raise ValueError(f"its {name} {error}") from None
