"""A server of our own: the real program, on a free loopback port, for as long as a test needs it."""

import os
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil

ROOT = Path(__file__).parent.parent


class Server:
    """Started with `arguments`; its folders for temporary files and for work are empty, so that traces are seen."""

    def __init__(self, folder: Path, *arguments: str, seconds: int = 600):
        self.here, self.temporary, self.log = folder / "here", folder / "temporary", folder / "log"
        for made in (self.here, self.temporary):
            made.mkdir(parents=True)
        code = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = os.environ | {"TMPDIR": str(self.temporary), "PYTHONPATH": code}
        command = [sys.executable, "-m", "rolling_diffusion.cli", "serve", "--port", "0", *arguments]
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(
                command, cwd=self.here, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        end = time.monotonic() + seconds
        while "listening on" not in self.said():
            if self.process.poll() is not None or time.monotonic() > end:
                self.stop()
                raise RuntimeError(self.said())
            time.sleep(0.1)
        self.url = self.said().partition("listening on ")[2].split()[0]

    def said(self) -> str:
        return self.log.read_text()

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def get(self, path: str):
        return httpx.get(self.url + path, timeout=30)

    def count(self, name: str) -> float:
        """A metric's value."""
        lines = self.get("/metrics").text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(f"rolling_diffusion_{name}"))

    def until(self, condition, seconds: float = 60):
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, "it did not come to that"
            time.sleep(0.05)

    def idle(self) -> bool:
        health = self.get("/health").json()
        return not health["drawing"] + health["waiting"]

    def written(self) -> list[str]:
        return [str(path) for folder in (self.here, self.temporary) for path in folder.rglob("*")]

    def memory(self) -> int:
        return psutil.Process(self.process.pid).memory_info().rss


@contextmanager
def hosted(app):
    """The URL of an application that uvicorn serves from a thread of this process."""
    import uvicorn

    from rolling_diffusion.cli.serve import listen

    with listen("127.0.0.1", 0) as listener:
        config = uvicorn.Config(app, access_log=False, log_level="critical", timeout_graceful_shutdown=1, lifespan="on")
        served = uvicorn.Server(config)
        thread = threading.Thread(target=served.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            served.should_exit = True
            thread.join(20)
            assert not thread.is_alive()
