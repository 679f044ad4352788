"""The program: picks the command, and turns what goes wrong into one sentence."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from .. import __version__
from . import evaluate, generate, plan, train
from .arguments import Parser, fail, nearest

COMMANDS = {
    "generate": (generate, "draw a picture from a prompt"),
    "plan": (plan, "show what a plan costs and how it looks"),
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
    """Runs the program; returns its exit code: 0, 1 out of memory, 2 after bad input, 130 after Ctrl-C.

    Where the reader of its output has left, as `head` does, it ends quietly with 1.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = make_parser()
    if not argv:
        parser.print_help()
        return 0
    if not argv[0].startswith("-") and argv[0] not in COMMANDS:
        return fail(f"there is no command {argv[0]!r}{nearest(argv[0], COMMANDS)}: choose from {', '.join(COMMANDS)}")
    try:
        values = parser.strict(argv)
        code = values.run(values)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python flushes, and fails, once more
        return 1
    except ValueError as error:
        return fail(str(error))
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # named, not imported: most commands never need torch
            raise
        fail(str(error))
        return 1
    except KeyboardInterrupt:
        print("rolling-diffusion: stopped", file=sys.stderr)
        return 130
