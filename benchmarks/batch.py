"""`rolling-diffusion batch` on this machine: what kills lose, two workers against one, and what docs/scaling.md needs.

python -m benchmarks.batch            measures, on the CPU, with one thread a worker; keeps it in benchmarks/batch.json
python -m benchmarks.batch --kills    kills workers and whole runs, 10 times each; kept there, too
python -m benchmarks.batch --paper    the tables of docs/scaling.md, from that and from plans; runs nothing
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import time
import tracemalloc
from contextlib import suppress
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import psutil
import torch
from PIL import Image

from rolling_diffusion.cli.batch import pictures_in, read, rows
from rolling_diffusion.cli.files import read_record, save_png
from rolling_diffusion.cli.main import main, make_parser
from rolling_diffusion.cli.workers import Cluster, Task, Worker

from .flux import CARD, FLUX, TEXT, arithmetic, plan_of

RESULTS = Path(__file__).parent / "batch.json"
SMALL = ("--width", "64", "--height", "64", "--steps", "6", "--device", "cpu")
PROMPTS, SEEDS, KILLS = ("a red ball", "a blue boat"), 30, 10
MILLION, GPUS, GIGAPIXEL = 10**6, 64, 2**15  # prompts, GPUs, pixels a side


def seconds_of(call: Any) -> float:
    """Seconds of this process on a core: on a machine that has nothing else to do, those of a clock."""
    start = time.process_time()
    call()
    return time.process_time() - start


def workers(pairs: int = 3, each: int = 40) -> dict[str, Any]:
    """Pictures a second of two workers against one, in interleaved pairs, once all workers are at work."""

    def rate(count: int) -> float:
        tasks = [Task(i, {"prompt": PROMPTS[0], "seed": i}, f"{i:032x}.png") for i in range(each)]
        common = {"width": 64, "height": 64, "steps": 10, "device": "cpu"}
        with TemporaryDirectory() as out, Cluster(None, count, 0, 1, "cpu") as cluster:
            times = [time.perf_counter() for _ in cluster.draw(tasks, common, Path(out), print)]
        first = each // 3  # by then both have long loaded their models
        return (each - 1 - first) / (times[-1] - times[first])

    found = [(rate(1), rate(2)) if i % 2 else (rate(2), rate(1))[::-1] for i in range(pairs)]
    ratios = sorted(two / one for one, two in found)
    return {
        "two against one": round(median(ratios), 2),
        "all ratios": [round(ratio, 2) for ratio in ratios],
        "cores": os.cpu_count(),
    }


def picture() -> dict[str, Any]:
    """Seconds of one thread, and bytes, of a picture of the embedded model at its defaults: the second of two."""
    with TemporaryDirectory() as folder:
        worker = Worker()
        worker.load({"device": "cpu"}, {"prompt": PROMPTS[0]}, folder, 1)
        worker.draw({"prompt": PROMPTS[0]}, "one.png")
        seconds = seconds_of(lambda: worker.draw({"prompt": PROMPTS[0], "seed": 1}, "two.png"))
        return {"seconds a picture": round(seconds, 3), "bytes a picture": (Path(folder) / "two.png").stat().st_size}


def driver(count: int = 5000) -> dict[str, Any]:
    """What the program itself costs: a line to read, check and name; a picture to find again; a call to a worker."""
    with TemporaryDirectory() as folder:
        file, out = Path(folder) / "p.jsonl", Path(folder)
        file.write_text("".join(f'{{"prompt": "a red ball above a blue boat", "seed": {i}}}\n' for i in range(count)))
        values = make_parser().strict(["batch", str(file), "-o", folder])
        read(values, {}, here=True)
        line = seconds_of(lambda: read(values, {}, here=True)) / count
        tracemalloc.start()
        tasks, wrong = read(values, {}, here=True)
        memory = tracemalloc.get_traced_memory()[0] / count
        tracemalloc.stop()
        record = {"said": {"prompt": "a red ball above a blue boat", "seed": 1}, "seconds": 1.0}
        for i in range(count // 10):
            save_png(out / f"{i:032x}.png", Image.new("RGB", (64, 64)), record)
        scan = seconds_of(lambda: pictures_in(out)) / (count // 10)
        table = seconds_of(lambda: rows(tasks, wrong, {}, {})) / count
    with Cluster(None, 1, 0, 1, "cpu") as cluster:
        echo = cluster.ray.remote(num_cpus=1)(type("Echo", (), {"say": lambda self, word: word})).remote()
        cluster.ray.get(echo.say.remote(1))
        start = time.perf_counter()
        for i in range(1000):
            cluster.ray.get(echo.say.remote(i))
        call = (time.perf_counter() - start) / 1000
    return {
        "seconds a line": line,
        "bytes a line": round(memory),
        "seconds a picture found": scan,
        "seconds a row": table,
        "seconds a call": call,
    }


def kills() -> dict[str, Any]:
    """Kills a worker and then the whole run, at random moments, 10 times; the run after that draws what is left."""
    word = f"{os.getpid()}-{time.time_ns()}"
    env = {**os.environ, "OMP_NUM_THREADS": "1", "BATCH_RUN": word}
    moment, lost = random.Random(0), {"worker": 0, "run": 0}
    with TemporaryDirectory() as folder:
        file, out, apart = Path(folder) / "p.csv", Path(folder) / "out", Path(folder) / "generate"
        lines = [f"{prompt},{seed}\n" for prompt in PROMPTS for seed in range(SEEDS)]
        file.write_text("prompt,seed\n" + "".join(lines))
        apart.mkdir()
        for prompt in PROMPTS:
            main(["generate", prompt, *SMALL, "--batch", str(SEEDS), "-o", str(apart / f"{prompt}.png")])
        argv = [sys.executable, "-m", "rolling_diffusion.cli", "batch", str(file), "-o", str(out), "--workers", "2"]
        runs, finished = 0, False
        while not finished:
            run = subprocess.Popen([*argv, *SMALL], env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            runs += 1
            before = len(list(out.glob("*.png")))
            # As many pictures as leave some for the later runs, and a moment more.
            goal = before + moment.randint(0, 2)
            while run.poll() is None and lost["run"] < KILLS:
                at_work = processes("ray::Worker", word)
                if at_work and len(list(out.glob("*.png"))) >= goal:
                    time.sleep(moment.uniform(0, 0.2))
                    if lost["worker"] <= lost["run"]:
                        with suppress(psutil.NoSuchProcess):
                            moment.choice(at_work).kill()
                        lost["worker"] += 1
                        goal += moment.randint(0, 1)
                    else:
                        run.kill()
                        lost["run"] += 1
                time.sleep(0.01)
            finished = run.wait() >= 0  # below 0: killed
        table = [json.loads(line) for line in (out / "manifest.jsonl").read_text().splitlines()]
        names = {row["file"] for row in table}
        alike = sum(same(out / row["file"], apart / f"{row['prompt']}-{row['seed'] + 1}.png") for row in table)
        stray = {path.name for path in out.iterdir()} - names - {"manifest.jsonl"}
    return {
        "pictures": len(lines),
        "runs": runs,
        "kills of a worker": lost["worker"],
        "kills of the run": lost["run"],
        "there once": len(names) if len(table) == len(lines) else 0,
        "as generate's": alike,
        "half or stray": len(stray),
    }


def processes(name: str, word: str) -> list[psutil.Process]:
    """Those of the runs with this BATCH_RUN in their environment, whose name begins so."""
    found = []
    for process in psutil.process_iter(["name"]):
        try:
            if process.info["name"].startswith(name) and process.environ().get("BATCH_RUN") == word:
                found.append(process)
        except psutil.Error:
            continue
    return found


def same(one: Path, two: Path) -> bool:
    """The same pixels, and the same record of them, but for the seconds that a batch adds."""
    with Image.open(one) as a, Image.open(two) as b:
        pixels = [np.asarray(image.convert("RGB")) for image in (a, b)]
    records = [{k: v for k, v in read_record(file).items() if k != "seconds"} for file in (one, two)]
    return np.array_equal(*pixels) and records[0] == records[1]


def span(seconds: float) -> str:
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:.1f} seconds"


def paper(found: dict[str, Any]) -> str:
    """The tables of docs/scaling.md."""
    one, own, killed = found["picture"], found["driver"], found.get("kills", {})
    million = [
        ("drawing, each second that a picture takes", span(MILLION / GPUS)),
        ("drawing with the embedded model, 256×256, a CPU thread in a GPU's place",
         f"{span(MILLION * one['seconds a picture'] / GPUS)}, at {one['seconds a picture']:.2f} s each"),
        ("reading, checking and naming the lines", span(MILLION * own["seconds a line"])),
        ("memory of the lines", f"{MILLION * own['bytes a line'] / 2**30:.1f} GiB"),
        ("finding again what is there", span(MILLION * own["seconds a picture found"])),
        ("making the rows of the manifest", span(MILLION * own["seconds a row"])),
        ("pictures a second that the program can hand out, one call after the other",
         f"{1 / own['seconds a call']:,.0f}"),
        ("disk, of pictures like the embedded model's", f"{MILLION * one['bytes a picture'] / 1e9:,.0f} GB"),
    ]  # fmt: skip
    lines = [f"| a million prompts, {GPUS} workers | |", "| --- | --- |"]
    lines += [f"| {name} | {value} |" for name, value in million]
    if ways := found.get("workers"):
        lines += [
            "",
            f"Two workers against one, one thread each: {ways['two against one']:.2f} times as many pictures a second",
            f"(pairs: {', '.join(map(str, ways['all ratios']))}; {ways['cores']} cores).",
        ]
    if killed:
        lines += ["", "| " + " | ".join(killed) + " |", "|" + " --- |" * len(killed)]
        lines += ["| " + " | ".join(str(value) for value in killed.values()) + " |"]
    lines += [
        "",
        "| one canvas of a gigapixel | model calls | work, in pictures of 1024² | tokens in motion | tokens seen |",
        "| --- | --- | --- | --- | --- |",
    ]
    unit = arithmetic(plan_of(1024, 1024, {}), FLUX)
    for name, way in {
        "ordinary sampling": {"lag": 0},
        "rolling, the defaults": {},
        "rolling, no guide": {"guide": False},
        "rolling, no draft": {"draft": 0},
        "spiral-out, no draft": {"draft": 0, "order": "spiral-out"},
        "spiral-out, no draft, window 128, overlap 32": {
            "draft": 0,
            "order": "spiral-out",
            "window": 128,
            "overlap": 32,
        },
    }.items():
        plan = plan_of(GIGAPIXEL, GIGAPIXEL, way)
        cost = plan.cost(TEXT, CARD.reach)
        draft = plan.height * plan.width // plan.multiple**2 if plan.draft > plan.first else 0  # of the whole canvas
        moving = max(draft, cost.peak_moving_tokens)
        work = arithmetic(plan, FLUX) / unit
        seen = max(draft, cost.peak_visible_tokens)
        lines.append(f"| {name} | {cost.calls:,} | {work:,.0f} | {moving:,} | {seen:,} |")
    return "\n".join(lines)


def run() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", action="store_true")
    parser.add_argument("--paper", action="store_true")
    values = parser.parse_args()
    found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    if values.paper:
        print(paper(found))
        return
    torch.set_num_threads(1)
    os.environ |= {"RAY_worker_niceness": "0"}  # Ray's own 15 would measure whatever else the machine does
    for part in (kills,) if values.kills else (picture, driver, workers):
        found[part.__name__] = part()
        RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    run()
