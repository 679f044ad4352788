"""Serving pictures: OpenAI's image API, and a page to watch them appear on. Needs the extra `serve`."""

from .app import make_app
from .job import Limits
from .studio import Studio

__all__ = ["Limits", "Studio", "make_app"]
