"""Workers: Ray actors that hold one model each, and draw and write one picture after the other.

A worker that dies is replaced, and its picture given to the next: a picture is there once, whole, or not at all.
"""

from __future__ import annotations

import argparse
import math
import os
import platform
import secrets
import socket
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .arguments import needs
from .files import Unwritten, check_target, save_png
from .generate import SETTINGS, draw, load_for, prepare
from .model import resolved, warnings_of
from .replay import record

TRIES = 3  # workers that one picture, or one place to work at, may lose
PATIENCE = 60  # seconds without any worker, after which is said what is waited for
STORE = 80 * 2**20  # bytes that Ray keeps for what tasks pass on: here a few words


class Hung(Exception):
    """Why a worker is given up that has not ended."""


class Stopped(Exception):
    """Why no worker can go on."""


@dataclass(frozen=True)
class Task:
    """A picture to draw: the number of its line, what the line says, and the name of its file."""

    number: int
    said: dict[str, Any]
    name: str


@dataclass(frozen=True)
class Done:
    """A picture that was drawn, in so many seconds, or the error in its place; with what the model did not read."""

    task: Task
    seconds: float | None = None
    error: str | None = None
    warnings: Sequence[str] = ()


def namespace(common: dict[str, Any], said: dict[str, Any]) -> argparse.Namespace:
    """What `generate` would be told for a line: what is said for all pictures, and by the line."""
    none = dict.fromkeys((*SETTINGS, "again"))
    return argparse.Namespace(**{**none, "batch": 1, **common, **said})


class Worker:
    """One model, in a process of its own."""

    def load(self, common: dict[str, Any], said: dict[str, Any], out: str, threads: int) -> str | None:
        """Loads the model; returns None, or why it cannot be loaded here. said: by any line, as all are of a kind."""
        import torch

        torch.set_num_threads(threads)
        self.common, self.out = common, Path(out)
        try:
            check_target(self.out / "picture.png", (".png",))
            job = prepare(namespace(common, said), outputs=[])
            self.folder, self.pipeline = job.folder, load_for(job)
        except Exception as error:
            return f"{sentence(error)} (on {platform.node()})"
        return None

    def draw(self, said: dict[str, Any], name: str) -> dict[str, Any]:
        """Draws and writes a picture. What is wrong with the line, or too large, is its error; whatever else goes wrong
        is the worker's: it is raised, and ends it."""
        values, file = namespace(self.common, said), self.out / name
        try:
            job = prepare(values, (self.folder, self.pipeline.card), outputs=[])
            settings = job.settings | resolved(self.pipeline, job.settings)
            warnings = warnings_of(self.pipeline, settings["prompt"], settings["negative_prompt"])
            started = time.perf_counter()
            image = draw(self.pipeline, settings, job)
            seconds = round(time.perf_counter() - started, 3)
        except Exception as error:
            return {"error": sentence(error)}
        try:
            save_png(file, image, record(job.said, settings) | {"seconds": seconds})
        except Unwritten as error:
            return {"unwritten": f"{error} (on {platform.node()})"}
        return {"seconds": seconds, "warnings": [warning.partition(". It knows:")[0] for warning in warnings]}


def sentence(error: Exception) -> str:
    """What is wrong with a line or the model, or too large; any other error is the worker's, and is raised."""
    from ..pipeline.space import NONE_LEFT, OutOfMemory, ran_out

    if not isinstance(error, ValueError) and not ran_out(error):
        raise error
    return " ".join(str(error).split()) if isinstance(error, (ValueError, OutOfMemory)) else NONE_LEFT


def ray() -> Any:
    """The library; ValueError where it is not installed."""
    try:
        import ray
    except ImportError:
        raise ValueError(needs("batch", "batch")) from None
    return ray


def settle(local: bool) -> None:
    """What Ray reads from the environment as it is imported. local: for a cluster of our own."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    if local:
        # Else Ray's servers would listen to every network that the machine is on.
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
        # Other users of this machine could reach it still: they would need this word, which no file holds.
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))  # Ray reads it once in a process


def check_reach(address: str) -> None:
    """ValueError unless something answers there: Ray itself would ask for minutes."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except (OSError, ValueError, OverflowError):
        raise ValueError(f"--ray-address {address}: no cluster answers there: take HOST:PORT, or auto") from None


class Cluster:
    """Ray, started here for as long as this lasts, or joined; and the workers on it."""

    def __init__(
        self,
        address: str | None,
        workers: int | None,
        gpus: float | None,
        cpus: int | None,
        device: str,
        echo: bool = False,
    ):
        """workers: None for one on each GPU, and one where there is none. gpus, cpus: of a worker; None for one GPU,
        where there are any, and for this machine's threads, shared out. echo: what workers print is printed here.
        ValueError, where it cannot be so."""
        import torch

        local = address is None
        if ":" in (device or ""):
            raise ValueError(f"--device {device} names one device, and workers take one each: say cuda, or cpu")
        settle(local)
        if address is not None and address.startswith("ray://"):
            raise ValueError(f"--ray-address {address} is of Ray's client: run batch on a machine of the cluster")
        if address not in (None, "auto"):
            check_reach(address)
        self.ray = ray()
        quiet = {"log_to_driver": echo, "logging_level": "ERROR", "configure_logging": False}
        try:
            if not local:
                self.ray.init(address=address, **quiet)
                there = self.ray.cluster_resources().get("GPU", 0)
            else:
                there = torch.cuda.device_count()
            self.gpus = (min(1, there) if device != "cpu" else 0) if gpus is None else gpus
            if local and self.gpus > there:
                raise ValueError(f"--gpus-per-worker is {self.gpus:g}, and this machine has {there:g} GPUs")
            self.count = workers or max(1, int(there / self.gpus) if self.gpus else 1)
            if local and self.count * self.gpus > there:
                raise ValueError(
                    f"{self.count} workers of {self.gpus:g} GPUs each are more than this machine's {there:g}: take "
                    f"{int(there / self.gpus)}, or --device cpu"
                )
            self.cpus = cpus or (max(1, torch.get_num_threads() // self.count) if local else 1)
            if local:
                self.ray.init(
                    address="local",
                    num_cpus=self.count * self.cpus,
                    include_dashboard=False,
                    _node_ip_address="127.0.0.1",
                    object_store_memory=STORE,
                    **quiet,
                )
        except ValueError:
            self.close()
            raise
        except Exception as error:  # Ray raises a bare one where a machine is too busy to start it in time
            self.close()
            why = " ".join(str(error).split())[:200]
            raise ValueError(f"Ray cannot be started: {why}" if local else f"cannot join {address}: {why}") from None

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.ray.shutdown()

    def draw(
        self,
        tasks: Sequence[Task],
        common: dict[str, Any],
        out: Path,
        note: Callable[[str], None],
        limit: float = math.inf,
    ) -> Iterator[Done]:
        """Has the workers draw all tasks, each as soon as one is free. limit: seconds of one picture, after which its
        worker is taken for hung, and replaced as one that died. Unwritten where a picture could not be written;
        Stopped where no worker is left."""
        if not tasks:
            return
        kind = self.ray.remote(Worker).options(num_cpus=self.cpus, num_gpus=self.gpus)
        todo, tries = deque(tasks), Counter()
        idle: list[Any] = []
        # By what is waited for: a worker, its task, or None as it loads, and when that has to be done.
        busy: dict[Any, tuple[Any, Task | None, float]] = {}
        lost, ready, patience = 0, False, PATIENCE
        unfit: list[str] = []  # why workers could not load the model

        def hire() -> None:
            worker = kind.remote()
            busy[worker.load.remote(common, tasks[0].said, str(out), self.cpus)] = worker, None, math.inf

        for _ in range(min(self.count, len(tasks))):
            hire()
        while todo or any(task for _, task, _ in busy.values()):
            while idle and todo:
                worker, task = idle.pop(), todo.popleft()
                busy[worker.draw.remote(task.said, task.name)] = worker, task, time.monotonic() + limit
            if not busy:
                raise Stopped(unfit[-1])
            while ready and unfit:
                note(f"a worker could not start, and the others go on: {unfit.pop()}")
            end = min(until for _, _, until in busy.values())
            pause = patience if end == math.inf else max(0.0, end - time.monotonic())
            found, _ = self.ray.wait(list(busy), timeout=pause)
            late = [each for each, (_, _, until) in busy.items() if until <= time.monotonic()] if not found else []
            if not found and end < math.inf and not late:  # woken a moment too early
                continue
            if not found and not late:
                note(f"no worker has loaded its model for {PATIENCE} seconds; {self.wanted()}")
                patience = None
                continue
            done = (found or late)[0]
            worker, task, _ = busy.pop(done)
            try:
                if late:
                    raise Hung(f"it took more than {limit:g} seconds")
                answer = self.ray.get(done)
            except (self.ray.exceptions.RayError, Hung) as error:  # the worker is gone, broken, or hung
                self.ray.kill(worker)
                if task is None:
                    lost += 1
                    if lost < TRIES * self.count:
                        hire()
                    else:
                        unfit.append(f"the model cannot be loaded: {reason(error)}")
                    continue
                hire()
                tries[task.name] += 1
                if tries[task.name] < TRIES:
                    todo.appendleft(task)
                else:
                    yield Done(task, error=f"{TRIES} workers were lost over it, at last to this: {reason(error)}")
                continue
            if task is not None:
                yield self.judged(task, answer, out)
            elif answer is not None:
                self.ray.kill(worker)
                unfit.append(answer)
                continue
            else:
                lost, ready, patience = 0, True, None
            idle.append(worker)

    def judged(self, task: Task, answer: dict[str, Any], out: Path) -> Done:
        """What a worker answers, unless nothing more can be written: then Unwritten, or Stopped."""
        if "unwritten" in answer:
            raise Unwritten(answer["unwritten"])
        if "error" not in answer and not (out / task.name).exists():
            raise Stopped(f"{task.name} was written, and is not here: {out} must be a folder that all machines share")
        return Done(task, **answer)

    def wanted(self) -> str:
        has = self.ray.cluster_resources()
        return (
            f"each takes {self.gpus:g} GPUs and {self.cpus} CPUs, and the cluster has {has.get('GPU', 0):g} and "
            f"{has.get('CPU', 0):g}"
        )


def reason(error: BaseException) -> str:
    cause = getattr(error, "cause", None)
    first = str(cause or error).strip().partition("\n")[0]
    return f"{type(cause).__name__}: {first}" if isinstance(cause, BaseException) else first
