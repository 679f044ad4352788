"""`python -m benchmarks.serve`: eight clients for two minutes at `rolling-diffusion serve`; every answer is checked.

Each client asks for one picture after the other, of a few whose bytes are known. Prints pictures a second, the wait,
and how evenly the clients were served.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import httpx

SEEDS = 5  # pictures that are asked for


@dataclass
class Told:
    """What came of a load. counts: answers of each client. wrong: answers that are not the known bytes."""

    counts: list[int]
    seconds: list[float] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    wrong: list[int] = field(default_factory=list)


def asked(seed: int) -> dict[str, Any]:
    return {"prompt": "a red ball", "size": "64x64", "steps": 2, "cfg": 1, "seed": seed}


def load(url: str, clients: int, seconds: float) -> Told:
    """So many clients at once. All begin together, and each one's last answer is waited for."""
    known = [ask(url, seed) for seed in range(SEEDS)]
    told, begin = Told([0] * clients), threading.Barrier(clients)

    def client(number: int) -> None:
        seed = number
        begin.wait()
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            started = time.monotonic()
            seed = (seed + 1) % SEEDS
            try:
                if ask(url, seed) != known[seed]:
                    told.wrong.append(seed)
            except Exception as error:
                told.errors.append(repr(error))
                return
            told.counts[number] += 1
            told.seconds.append(time.monotonic() - started)

    threads = [threading.Thread(target=client, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return told


def ask(url: str, seed: int) -> str:
    answer = httpx.post(f"{url}/v1/images/generations", json=asked(seed), timeout=120)
    answer.raise_for_status()
    return answer.json()["data"][0]["b64_json"]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition(":")[2])
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=120)
    values = parser.parse_args()
    command = [sys.executable, "-m", "rolling_diffusion.cli", "serve", "--port", "0"]
    log = tempfile.TemporaryFile("w+")  # noqa: SIM115 (as long as the program)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
    try:
        assert process.stdout is not None
        told = process.stdout.readline()
        if not told:
            log.seek(0)
            sys.exit(f"the server did not start: {log.read()}")
        url = told.split()[-1]
        ask(url, 0)  # what is made once is made
        before = memory(process.pid)
        told = load(url, values.clients, values.seconds)
        after = memory(process.pid)
    finally:
        process.terminate()
        process.wait()
    print(f"{values.clients} clients, {values.seconds:g} s: {sum(told.counts)} pictures")
    print(*told.errors, sep="\n", end="")
    print(f"errors {len(told.errors)}, wrong answers {len(told.wrong)}, answers of each client {told.counts}")
    print(f"seconds from request to answer: median {median(told.seconds):.2f}, longest {max(told.seconds):.2f}")
    print(f"memory {before / 2**20:.0f} MiB before, {after / 2**20:.0f} MiB after")


def memory(process: int) -> int:
    import psutil

    return psutil.Process(process).memory_info().rss


if __name__ == "__main__":
    main()
