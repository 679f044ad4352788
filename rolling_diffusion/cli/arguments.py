"""Arguments: types that explain themselves, names that forgive a slip, errors of one sentence."""

from __future__ import annotations

import argparse
import difflib
import math
import re
import sys
from collections.abc import Callable, Collection, Sequence
from typing import NoReturn

from ..defaults import LAST_SEED
from . import ranks


def nearest(word: str, names: Collection[str]) -> str:
    """` (did you mean 'x'?)` for a near miss, else nothing."""
    close = difflib.get_close_matches(word.lower(), names, n=1, cutoff=0.6)
    return f" (did you mean {close[0]!r}?)" if close else ""


MOST = 2**63 - 1  # of a number whose limit is nowhere near
TEXTS = ("--negative-prompt",)  # options whose value may begin with a dash


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one sentence on stderr and exit code 2; no abbreviated options."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        message = re.sub(r"^argument (\S+): ", r"\1 ", message)
        self.exit(2, f"{self.prog}: {message}\n" if ranks.first() else None)

    def strict(self, argv: Sequence[str]) -> argparse.Namespace:
        """Parses everything; an option or a word too many is named, with the nearest option that exists."""
        words: list[str] = []
        for word in argv:
            if words and words[-1] in TEXTS and re.match("-[^-]", word):
                word = f"{words.pop()}={word}"
            words.append(word)
        values, rest = self.parse_known_args(words)
        if not rest:
            return values
        home: Parser = getattr(values, "parser", self)
        word = next((r for r in rest if r.startswith("-")), rest[0])
        if word.startswith("-"):
            option = word.partition("=")[0]
            home.error(f"knows no option {option}{nearest(option, home._option_string_actions)}")
        home.error(f"has no use for {word!r}: put a prompt of several words in quotes")


def name_in(names: Collection[str]) -> Callable[[str], str]:
    """Type of an option that takes one of `names`."""

    def named(text: str) -> str:
        if text in names:
            return text
        raise argparse.ArgumentTypeError(f"knows no {text!r}{nearest(text, names)}: choose from {', '.join(names)}")

    return named


def whole_number(low: int = 0, high: int = MOST) -> Callable[[str], int]:
    """Type of an option that takes a whole number of at least `low`, and of at most `high`."""

    def number(text: str) -> int:
        # A number of thousands of digits is refused unread, as Python itself would.
        value = int(text) if re.fullmatch(r"[+-]?\d{1,1000}", text) else low - 1
        if low <= value <= high:
            return value
        allowed = f"of at least {low}" if value < low and high == MOST else f"from {low} to {high}"
        raise argparse.ArgumentTypeError(f"must be a whole number {allowed}, not {text[:60]!r}")

    return number


seed = whole_number(0, LAST_SEED)


def decimal(low: float, high: float = math.inf) -> Callable[[str], float]:
    """Type of an option that takes a number from `low` to `high`."""

    def number(text: str) -> float:
        try:
            value = math.nan if "_" in text else float(text)  # Python reads 1_0 as 10
        except ValueError:
            value = math.nan
        if low <= value <= high and math.isfinite(value):
            return value
        allowed = f"from {low:g} to {high:g}" if high < math.inf else f"of at least {low:g}"
        raise argparse.ArgumentTypeError(f"must be a number {allowed}, not {text!r}")

    return number


def number_or(word: str, unit: str) -> Callable[[str], int | str]:
    """Type of an option that takes a whole number of `unit`, or one word."""

    def number(text: str) -> int | str:
        if text == word:
            return text
        try:
            return whole_number(0)(text)
        except argparse.ArgumentTypeError:
            message = f"must be a whole number of {unit} or {word!r}, not {text!r}"
            raise argparse.ArgumentTypeError(message) from None

    return number


def needs(what: str, extra: str) -> str:
    """The sentence for a part of the program whose packages are not installed."""
    name = f"autoregressive-rolling-diffusion[{extra}]"
    return f"{what} needs packages of its own: pip install '{name}', or in a clone pip install -e '.[{extra}]'"


def fail(sentence: str) -> int:
    """Says one sentence on stderr; returns exit code 2."""
    print(f"rolling-diffusion: {' '.join(sentence.split())}", file=sys.stderr)
    return 2
