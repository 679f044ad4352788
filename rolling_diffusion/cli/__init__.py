"""The command line: arguments, progress, files."""

from .main import main

__all__ = ["main"]
