"""The program: picks the command, and turns what goes wrong into one sentence."""

from __future__ import annotations

import codecs
import os
import sys
from collections.abc import Sequence
from contextlib import suppress

from .. import __version__
from . import batch, evaluate, extend, generate, plan, ranks, serve, stream, train
from .arguments import Parser, fail, nearest
from .files import Unwritten

COMMANDS = {
    "generate": (generate, "draw a picture from a prompt"),
    "stream": (stream, "draw a canvas of any length, with prompts along it"),
    "extend": (extend, "carry a picture on beyond its edges"),
    "batch": (batch, "draw a picture for each line of a file, on every core or GPU"),
    "plan": (plan, "show what a plan costs and how it looks"),
    "serve": (serve, "draw for others: OpenAI's image API, and a page"),
    "evaluate": (evaluate, "score how well a model follows prompts"),
    "train": (train, "train the embedded model"),
}


def make_parser() -> Parser:
    parser = Parser(
        prog="rolling-diffusion",
        description="Autoregressive rolling diffusion: pictures that grow in an order you choose.",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", parser_class=Parser)
    for name, (module, help) in COMMANDS.items():
        command = commands.add_parser(name, help=help, description=(module.__doc__ or help).partition(": ")[2])
        module.add_options(command)
        command.set_defaults(run=module.run, parser=command)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program; returns its exit code: 0, 1 where the machine failed it, 2 after bad input, 130 after Ctrl-C.

    The machine fails it where memory or a disk is full, or where what it prints can't be taken. A reader who has
    left, as `head` does, is told nothing.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        os.getcwd()
    except OSError:  # torch ends the program there
        return fail("the folder that this was called in is gone: change to one that exists")
    closed = sys.stdout is None
    open_streams()
    try:
        code = command(argv)
        sys.stdout.flush()
    except BrokenPipeError:
        mute()
        return 1
    except OSError as error:
        try:
            sys.stdout.flush()
        except OSError:
            mute()
        where = f"{error.filename}: " if error.filename else ""
        fail(f"cannot read or write: {where}{error.strerror or error}")
        return 1
    if closed and code == 0:
        fail("what it printed is lost: its output is closed")
        return 1
    return code


def command(argv: list[str]) -> int:
    parser = make_parser()
    if not argv:
        parser.print_help()
        return 0
    if not argv[0].startswith("-") and argv[0] not in COMMANDS:
        return fail(f"there is no command {argv[0]!r}{nearest(argv[0], COMMANDS)}: choose from {', '.join(COMMANDS)}")
    if argv[0] != "generate" and ranks.count() > 1:
        return fail(f"torchrun has several processes draw one picture, with generate: {argv[0]} takes one process")
    try:
        values = parser.strict(argv)
        return values.run(values)
    except ValueError as error:
        return fail(str(error)) if ranks.first() else 2  # all processes of torchrun find the same
    except Unwritten as error:
        fail(str(error))
        return 1
    except (MemoryError, RuntimeError) as error:
        from ..pipeline.space import NONE_LEFT, OutOfMemory, ran_out  # not before: most commands never need torch

        if not ran_out(error):
            raise
        fail(str(error) if isinstance(error, OutOfMemory) else NONE_LEFT)
        return 1
    except SystemExit as stop:  # of argparse: its help, or its errors
        return int(stop.code or 0)
    except KeyboardInterrupt:
        print("rolling-diffusion: stopped", file=sys.stderr)
        return 130


def open_streams() -> None:
    """Has what the terminal cannot show spelled in letters that it can, and a closed stream swallow what it is told."""
    codecs.register_error("rolling-diffusion", spell)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 (as long as the program)
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="rolling-diffusion")


def spell(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    letters = error.object[error.start : error.end].translate({ord("×"): "x", ord("–"): "-"})
    return letters.encode("ascii", "backslashreplace").decode(), error.end


def mute() -> None:
    """Has stdout lead nowhere: or Python would flush it, and fail, once more."""
    with suppress(OSError, ValueError):  # of a stream that is no file
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
