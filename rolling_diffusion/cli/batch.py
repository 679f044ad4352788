"""`rolling-diffusion batch`: a picture for each line of a file, on every core or GPU, here or on a Ray cluster."""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import re
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

from ..defaults import read_index
from ..recording import MACHINE
from .arguments import Parser, decimal, fail, name_in, whole_number
from .files import check_apart, check_target, is_whole_png, make_folder, put, read_record, save_json_lines, sweep
from .generate import DEFAULTS, SETTINGS, add_drawing_options, is_text, prepare
from .model import EMBEDDED, EMBEDDED_FOLDER, found, full
from .prompts import PICTURES, read_lines
from .workers import Cluster, Stopped, Task, namespace

OF_MODEL = ("model", "variant", *MACHINE, "lora", "quantize")  # said for all pictures: a worker loads its model once
OF_ALL = tuple(name for name in SETTINGS if name != "prompts")  # here the lines' file has that name
OF_LINE = tuple(name for name in OF_ALL if name not in OF_MODEL)
NAME = re.compile(r"[0-9a-f]{32}\.png")
MANIFESTS = ("jsonl", "parquet")
MOST_SHOWN = 20  # errors of lines; the manifest has all
Row = dict[str, Any]  # of a manifest


def add_options(parser: Parser) -> None:
    add = parser.add_argument
    add("prompts", type=Path, metavar="PROMPTS", help="a prompt a line (.txt), a table (.csv) or objects (.jsonl)")
    add("-o", "--output", type=Path, metavar="FOLDER", required=True, help="for the pictures and their manifest")
    add("--manifest", type=name_in(MANIFESTS), default="jsonl", metavar="NAME", help="jsonl, parquet (default: jsonl)")
    add("--workers", type=whole_number(1), metavar="N", help="(default: one a GPU; one where there is none)")
    add("--gpus-per-worker", type=decimal(0), metavar="X", help="0.5: two share one (default: 1, where there are any)")
    add("--cpus-per-worker", type=whole_number(1), metavar="N", help="threads (default: this machine's, shared out)")
    add("--timeout", type=decimal(1), metavar="SECONDS", help="of one picture, before its worker is taken for hung")
    add("--ray-address", metavar="ADDRESS", help="of a running cluster to join, or auto (default: one starts here)")
    add_drawing_options(parser)


def run(values: argparse.Namespace) -> int:
    """Draws what is not there yet. A line that goes wrong is told with its number, and makes the exit code 1."""
    if values.manifest == "parquet":
        arrow()
    address = values.ray_address or os.environ.get("RAY_ADDRESS") or None
    common = said_for_all(values)
    tasks, wrong = read(values, common, here=address is None)
    make_folder(values.output)
    out = values.output.resolve()
    manifest = out / f"manifest.{values.manifest}"
    check_target(manifest)
    for kind in MANIFESTS:  # the one that is written, and the other one, which goes
        check_apart({"PROMPTS": values.prompts, "the manifest": out / f"manifest.{kind}"})
    there = pictures_in(out)
    wanted = {task.name: task for task in reversed(tasks)}  # of lines that say the same, the first
    todo = [task for task in tasks if wanted[task.name] is task and task.name not in there]
    for number, row in list(wrong.items())[:MOST_SHOWN]:
        tell(number, row["error"])
    before, failed, code = len(wanted) - len(todo), {}, 0
    # Made before anything is drawn or written: what is wrong with it is refused.
    how = (address, values.workers, values.gpus_per_worker, values.cpus_per_worker, values.device)
    cluster = Cluster(*how) if todo else None
    try:
        if cluster is not None:
            with cluster:
                draw_all(cluster, todo, common, out, there, failed, before, values.timeout or math.inf)
    except Stopped as error:
        code = 1
        fail(str(error))
    finally:
        sweep(out)
        print(write(manifest, rows(tasks, wrong, failed, there, common.get("seed", 0))))
        drawn = sum(task.name in there for task in todo)
        lost = len(wrong) + sum(task.name in failed for task in tasks)
        print(f"{drawn} drawn, {before} there before, {lost} line{'s' * (lost != 1)} with errors", file=sys.stderr)
    return 1 if wrong or failed else code


def said_for_all(values: argparse.Namespace) -> dict[str, Any]:
    """What the options say. Files are named in full: workers may run elsewhere."""
    said = {name: value for name, value in vars(values).items() if name in OF_ALL and value is not None}
    for name in ("model", *PICTURES):
        if name in said and said[name] != EMBEDDED:
            said[name] = full(str(said[name]))
    if "lora" in said:
        said["lora"] = [(full(name), strength) for name, strength in said["lora"]]
    return said


def read(values: argparse.Namespace, common: dict[str, Any], here: bool) -> tuple[list[Task], dict[int, Row]]:
    """What is to be drawn, and what is wrong, by the number of the line, with its prompt and its error; all that can be
    refused is refused here.

    here: whether the workers run on this machine, so that it must have their device. ValueError for what is wrong with
    every line.
    """
    shared = common if here else {name: value for name, value in common.items() if name != "device"}
    model = {name: value for name, value in shared.items() if name in OF_MODEL}
    any_line = prepare(namespace(model, {"prompt": "anything"}), outputs=[])
    identity = identity_of(common.get("model", EMBEDDED))
    tasks: list[Task] = []
    wrong: dict[int, Row] = {}
    first = None
    for number, said in read_lines(values.prompts, values.parser, OF_LINE):
        try:
            if isinstance(said, ValueError):
                raise said
            job = prepare(namespace(shared, said), (any_line.folder, any_line.card), outputs=[])
            kind = "paints in a mask" if job.mask else "starts from a picture" if job.image else "starts from nothing"
            first = first or (number, kind)
            if kind != first[1]:
                raise ValueError(f"it {kind}, and line {first[0]} {first[1]}: give these a file of their own")
            tasks.append(Task(number, said, name_of(common | said, identity)))
        except ValueError as error:
            prompt = said["prompt"] if isinstance(said, dict) else getattr(said, "prompt", None)
            prompt = prompt if is_prompt(prompt) else None
            wrong[number] = {"prompt": prompt, "error": " ".join(str(error).split())}
    return tasks, wrong


def is_prompt(value: Any) -> bool:
    """Can a manifest of any kind hold it?"""
    return isinstance(value, str) and value.strip() != "" and is_text(value)


def name_of(said: Mapping[str, Any], identity: str) -> str:
    """The name of a picture's file: a hash of what was said for it, of the pictures it starts from, and of the model.

    What is the machine's own is no part of it, but for a dtype that was asked for; nor is a default that was said.
    """
    content = {name: value for name, value in said.items() if name in OF_ALL and value != DEFAULTS[name]}
    content = {name: value for name, value in content.items() if name not in MACHINE or name == "dtype"}
    for name in PICTURES:
        if name in content:
            content[name] = digest(Path(content[name]))
    if "lora" in content:
        content["lora"] = [[identity_of(name), strength] for name, strength in content["lora"]]
    content |= {"seed": said.get("seed", 0), "model": identity}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32] + ".png"


@cache
def identity_of(name: str) -> str:
    """A hash of a model's files, or a hub id with its revision; ValueError if the hub cannot be asked for that."""
    path = EMBEDDED_FOLDER if name == EMBEDDED else found(name)
    if path is None:
        return revision_of(name)
    if path.is_file():
        return digest(path)
    index = path / "model_index.json"
    entries = read_index(index) if index.is_file() else None
    parts = ["."] if entries is None else [part for part in entries if not part.startswith("_")]
    files = [file for part in parts for file in sorted((path / part).rglob("*")) if file.is_file()]
    with ThreadPoolExecutor() as pool:  # hashing leaves Python free: several files at a time
        known = dict(zip((file.relative_to(path).as_posix() for file in files), pool.map(digest, files)))
    return hashlib.sha256(json.dumps([entries or {}, known]).encode()).hexdigest()


def revision_of(name: str) -> str:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    for file in ("model_index.json", "README.md"):  # the second: of what is no pipeline, such as a LoRA
        try:
            return f"{name}@{Path(hf_hub_download(name, file)).parent.name}"
        except LocalEntryNotFoundError:  # no network, and not here
            break
        except EntryNotFoundError:
            continue
        except OSError:  # no such repository, or no access to it
            break
    raise ValueError(f"the hub tells no revision of {name}: name a folder, or see whether it can be reached")


@cache
def digest(path: Path) -> str:
    whole = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(2**20):
            whole.update(chunk)
    return whole.hexdigest()


def pictures_in(out: Path) -> dict[str, dict[str, Any]]:
    """The pictures in a folder that are whole, by name, with what they record of themselves."""
    return {
        entry.name: row
        for entry in os.scandir(out)
        if NAME.fullmatch(entry.name) and (row := recorded(out / entry.name)) is not None
    }


def recorded(file: Path) -> dict[str, Any] | None:
    """What a manifest tells of a picture; None for one that is not whole, or not of ours."""
    if not is_whole_png(file):
        return None
    try:
        record = read_record(file)
    except ValueError:
        return None
    said = record.get("said", {})
    if not isinstance(said, dict):
        return None
    row = {"prompt": said.get("prompt"), "seed": said.get("seed"), "seconds": record.get("seconds")}
    numbers = [(row["seed"], (int,)), (row["seconds"], (int, float))]
    fits = [value is None or (type(value) in kinds and 0 <= value < 2**64) for value, kinds in numbers]
    return row if all(fits) and (row["prompt"] is None or is_prompt(row["prompt"])) else None


def draw_all(
    cluster: Cluster,
    todo: Sequence[Task],
    common: dict[str, Any],
    out: Path,
    there: dict[str, dict[str, Any]],
    failed: dict[str, str],
    before: int,
    limit: float,
) -> None:
    """Draws them, shows how far it is, and enters each into `there`, or into `failed`, by its name."""
    from tqdm import tqdm

    # In a file or a log, where a bar cannot be drawn over, a line twice a minute.
    pause = 0.1 if sys.stderr.isatty() else 30.0
    with tqdm(total=before + len(todo), initial=before, unit="picture", dynamic_ncols=True, mininterval=pause) as bar:

        def say(text: str) -> None:
            bar.write(text, file=sys.stderr)

        for done in cluster.draw(todo, common, out, lambda note: say(f"note: {note}"), limit):
            task, said = done.task, common | done.task.said
            for warning in done.warnings:
                say(f"line {task.number}: warning: {warning}")
            if done.error is None:
                there[task.name] = {"prompt": said["prompt"], "seed": said.get("seed", 0), "seconds": done.seconds}
            else:
                failed[task.name] = done.error
                say(f"line {task.number}: {done.error}")
            bar.update()


def rows(
    tasks: Sequence[Task],
    wrong: Mapping[int, Row],
    failed: Mapping[str, str],
    there: Mapping[str, dict[str, Any]],
    seed: int = 0,
) -> list[dict[str, Any]]:
    """A row for each line, in order, and then for each other picture in the folder."""
    nothing = {"prompt": None, "file": None, "seed": None, "seconds": None, "error": None}
    found = {number: {"line": number, **nothing, **row} for number, row in wrong.items()}
    for task in tasks:
        row = {"line": task.number, **nothing, "prompt": task.said["prompt"], "seed": task.said.get("seed", seed)}
        if task.name in there:
            row |= {"file": task.name, **there[task.name]}
        else:
            row["error"] = failed.get(task.name, "not drawn: the run was stopped")
        found[task.number] = row
    others = sorted(there.keys() - {task.name for task in tasks})
    return [found[number] for number in sorted(found)] + [
        {"line": None, **nothing, "file": name, **there[name]} for name in others
    ]


def write(manifest: Path, table: list[dict[str, Any]]) -> Path:
    """Writes the manifest; one in the other format, which tells of an earlier run, goes."""
    if manifest.suffix == ".parquet":
        pa, parquet = arrow()
        texts = {name: pa.string() for name in ("prompt", "file", "error")}
        kinds = {"line": pa.int64(), **texts, "seed": pa.uint64(), "seconds": pa.float64()}
        schema = pa.schema([(name, kinds[name]) for name in ("line", "prompt", "file", "seed", "seconds", "error")])
        put(manifest, lambda part: parquet.write_table(pa.Table.from_pylist(table, schema), part))
    else:
        save_json_lines(manifest, table)
    for other in MANIFESTS:
        if other != manifest.suffix[1:]:
            manifest.with_suffix(f".{other}").unlink(missing_ok=True)
    return manifest


def arrow() -> Any:
    """pyarrow and its Parquet; ValueError where it is not installed."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ValueError("--manifest parquet needs pyarrow: pip install pyarrow, or take jsonl") from None
    return pyarrow, pyarrow.parquet


def tell(number: int, error: str) -> None:
    print(f"line {number}: {error}", file=sys.stderr)
