"""`rolling-diffusion serve`: pictures over HTTP, with OpenAI's image API, and a page on which they appear."""

from __future__ import annotations

import argparse
import logging.config
import os
import signal
import socket
import threading
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..defaults import Card
from .arguments import Parser, needs, whole_number
from .files import check_target
from .generate import add_model_options
from .model import EMBEDDED, base_name, full, load_said, locate, quiet
from .replay import shown

if TYPE_CHECKING:
    from fastapi import FastAPI

KEY = "ROLLING_DIFFUSION_API_KEY"
OF_MODEL = ("variant", "device", "dtype", "cpu_offload", "lora", "quantize")


def add_options(parser: Parser) -> None:
    add = parser.add_argument
    add("--host", default="127.0.0.1", metavar="NAME", help="address to listen on (default: 127.0.0.1)")
    add("--port", type=whole_number(0, 65535), default=8000, metavar="N", help="0 takes a free one (default: 8000)")
    add("--api-key", metavar="KEY", help=f"that callers bring; better said as {KEY} in the environment")
    add("--output", type=Path, metavar="FOLDER", help="write pictures here, so that response_format may be url")
    add("--replicas", type=whole_number(1), metavar="N", help="models that draw at a time, on Ray Serve, a GPU each")
    add("--queue", type=whole_number(1), default=32, metavar="N", help="requests that may stand in line (default: 32)")
    add("--max-n", type=whole_number(1), metavar="N", help="pictures of one request (default: 10)")
    add(
        "--max-steps",
        type=whole_number(1),
        metavar="N",
        help="of one picture (default: 100, or twice the model's)",
    )
    add("--max-pixels", type=whole_number(256), metavar="N", help="of one picture (default: four times the model's)")
    add("--max-calls", type=whole_number(1), metavar="N", help="of the model, for one picture (default: 1000)")
    add_model_options(parser)


def run(values: argparse.Namespace) -> int:
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import python_multipart  # noqa: F401
        import uvicorn
    except ImportError:
        raise ValueError(needs("serve", "serve")) from None
    quiet()
    from ..serve.guard import is_loopback

    key = values.api_key if values.api_key is not None else os.environ.get(KEY)
    if key is not None and not (key := key.strip()):
        raise ValueError("the key is empty: name one, or leave --api-key out")
    if key is None and not is_loopback(values.host):
        raise ValueError(f"--host {values.host} is open to others: give an --api-key, or leave --host out")
    if values.output is not None:
        if not values.output.is_dir():
            raise ValueError(f"--output {values.output}: there is no such folder")
        check_target(values.output / "picture.png")
    folder = locate(values.model or EMBEDDED)
    Card.in_folder(folder)  # refuses a card that is wrong before the model is loaded
    with listen(values.host, values.port) as listener:
        host, port = listener.getsockname()[:2]
        url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        if values.replicas is not None:
            listener.close()  # Ray Serve opens it anew
            return serve_replicas(values, key, folder, host, port, url)
        app = application(values, key, folder)
        print(f"listening on {url}", flush=True)
        # Its own log of requests would hold their queries. Whoever waits when it is told to stop, waits no longer.
        config = uvicorn.Config(
            app, access_log=False, log_config=LOGS, timeout_graceful_shutdown=1, server_header=False, lifespan="on"
        )
        uvicorn.Server(config).run(sockets=[listener])
    return 0


def application(values: argparse.Namespace, key: str | None, folder: str) -> FastAPI:
    """What is served, around a model that is loaded now."""
    quiet()
    from ..serve import Limits, Studio, make_app

    pipeline = load_said(folder, vars(values))
    name = base_name(values.model or EMBEDDED)
    said = {key: shown(key, value) for key in ("variant", "lora", "quantize") if (value := getattr(values, key))}
    studio = Studio(pipeline, name, values.queue, bool(values.cpu_offload), {"model": name, **said})
    named = {name: getattr(values, f"max_{name}") for name in ("n", "steps", "pixels", "calls")}
    limits = replace(Limits.of(studio.card), **{name: most for name, most in named.items() if most is not None})
    return make_app(studio, limits=limits, key=key, folder=values.output)


def serve_replicas(values: argparse.Namespace, key: str | None, folder: str, host: str, port: int, url: str) -> int:
    """The same application in several processes, behind Ray Serve's proxy."""
    from .replicas import served

    names = ("model", "queue", "max_n", "max_steps", "max_pixels", "max_calls", *OF_MODEL)  # not how to run it
    said = argparse.Namespace(**{name: getattr(values, name) for name in names})
    said.output = None if values.output is None else values.output.resolve()
    said.lora, folder = [(full(name), strength) for name, strength in values.lora or ()], full(folder)

    def make() -> FastAPI:
        logging.config.dictConfig(LOGS)
        return application(said, key, folder)

    with served(make, values.replicas, values.device or "auto", host, port, values.queue):
        print(f"listening on {url}", flush=True)
        wait_for_the_end()
    return 0


def wait_for_the_end() -> None:
    """Returns when the program is told to stop, as uvicorn would."""
    told = threading.Event()
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, lambda *_: told.set())
    while not told.wait(1):  # a wait without an end would hear no signal on Windows
        pass


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens; ValueError if the address cannot be had."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError) as error:
        raise ValueError(f"--host {host[:60]} cannot be found: {getattr(error, 'strerror', error)}") from None
    try:
        if os.name == "posix":
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(128)
    except OSError as error:
        listener.close()
        raise ValueError(f"cannot listen on {host} port {port}: {error.strerror or error}") from None
    return listener


LOGS = {
    "version": 1,
    "disable_existing_loggers": False,
    "formatters": {"line": {"format": "%(asctime)s %(message)s"}},
    "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "line"}},
    "loggers": {
        "uvicorn": {"handlers": ["stderr"], "level": "WARNING", "propagate": False},
        "rolling_diffusion.serve": {"handlers": ["stderr"], "level": "INFO", "propagate": False},
    },
}
