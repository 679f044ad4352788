"""Replicas: the server's application in several processes, each with a model of its own, behind Ray Serve's proxy."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from .arguments import needs
from .workers import Cluster, settle

if TYPE_CHECKING:
    from fastapi import FastAPI

BESIDE = 64  # requests, of /health and the like, that a replica answers beside those in its line


@contextmanager
def served(make: Callable[[], FastAPI], replicas: int, device: str, host: str, port: int, queue: int) -> Iterator[None]:
    """So many replicas of what `make` makes answer at an address, for as long as this lasts. ValueError if not.

    queue: requests in the line of each, which tells their places: Ray holds none back before it.
    """
    settle(local=True)
    os.environ |= {"RAY_DEDUP_LOGS": "0", "RAY_COLOR_PREFIX": "0"}  # every line of every replica, as plain text
    try:
        from ray import serve
        from ray.serve.config import HTTPOptions
        from ray.serve.schema import LoggingConfig
    except ImportError:
        raise ValueError(needs("--replicas", "serve,replicas")) from None
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    quiet = LoggingConfig(log_level="CRITICAL", enable_access_log=False)  # its log of requests would hold their paths
    with Cluster(None, replicas, None, None, device, echo=True) as cluster:

        def start() -> FastAPI:
            import torch

            loopback()
            torch.set_num_threads(cluster.cpus)
            return make()

        kind = serve.deployment(
            serve.ingress(start)(),
            name="model",
            num_replicas=replicas,
            max_ongoing_requests=queue + BESIDE,
            ray_actor_options={"num_cpus": cluster.cpus, "num_gpus": cluster.gpus},
            graceful_shutdown_timeout_s=1,
            logging_config=quiet,
        )
        serve.start(proxy_location="HeadOnly", http_options=HTTPOptions(host=host, port=port), logging_config=quiet)
        try:
            serve.run(kind.bind(), name="rolling", logging_config=quiet)
        except RuntimeError:
            told = serve.status().applications["rolling"].deployments["model"].message
            why = told.strip().splitlines()[-1].partition(": ")[2]  # of a traceback
            raise ValueError(f"the replicas cannot start: {why}") from None
        yield


def loopback() -> None:
    """Keeps a replica's own port, by which anyone could have it run code, off the networks of the machine: Ray 2.60
    opens it to all. Where a newer Ray has no such function any more, no replica starts."""
    from ray.serve._private import replica

    opened = replica.add_port_to_grpc_server
    replica.add_port_to_grpc_server = lambda server, address: opened(server, address.replace("[::]", "127.0.0.1"))
