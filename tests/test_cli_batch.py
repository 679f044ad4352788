"""`rolling-diffusion batch` on real Ray clusters of this machine, with the embedded model: kills lose nothing."""

import json
import os
import random
import secrets
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from PIL import Image

from benchmarks.batch import PROMPTS, SMALL, processes, same
from rolling_diffusion.cli import batch, main, workers
from rolling_diffusion.cli.files import save_png

pytest.importorskip("ray")
parquet = pytest.importorskip("pyarrow.parquet")

ROOT = Path(__file__).parent.parent
SEEDS = 6
PATIENCE = 300  # seconds, on a machine that has much else to do
# One thread each, the code of this folder, and a word by which every process of these clusters is known.
WORD = secrets.token_hex(16)
HERE = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
HERE |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": WORD, "BATCH_RUN": WORD}
HERE |= {"RAY_worker_niceness": "0"}  # Ray's own 15 would have the tests wait for all else that the machine does
CLUSTER = """
import ray, sys
ray.init("local", num_cpus=2, include_dashboard=False, _node_ip_address="127.0.0.1", object_store_memory=80 * 2**20)
print(ray.get_runtime_context().gcs_address, flush=True)
sys.stdin.read()
"""


@pytest.fixture()
def start():
    """Starts the command with such words, and ends it with the test."""
    runs = []

    def started(*argv: object, **env: str) -> subprocess.Popen:
        words = [sys.executable, "-m", "rolling_diffusion.cli", "batch", *map(str, argv), *SMALL]
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        runs.append(subprocess.Popen(words, cwd=ROOT, env={**os.environ, **HERE, **env}, **streams))
        return runs[-1]

    yield started
    for run in runs:
        run.kill()


def ended(run: subprocess.Popen) -> tuple[int, str]:
    _, errors = run.communicate(timeout=PATIENCE)
    return run.returncode, errors


def pictures(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.png"))


def waited(until) -> None:
    end = time.monotonic() + PATIENCE
    while not until():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def manifest(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "manifest.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def expected(tmp_path_factory) -> dict[tuple[str, int], Path]:
    """What `generate` draws, by prompt and seed."""
    folder, threads = tmp_path_factory.mktemp("generate"), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for prompt in PROMPTS:
            argv = ["generate", prompt, *SMALL, "--seed", "0", "--batch", str(SEEDS)]
            assert main([*argv, "-o", str(folder / f"{prompt}.png")]) == 0
    finally:
        torch.set_num_threads(threads)
    return {(prompt, seed): folder / f"{prompt}-{seed + 1}.png" for prompt in PROMPTS for seed in range(SEEDS)}


@pytest.fixture(scope="module")
def cluster():
    """The address of a running cluster."""
    words = [sys.executable, "-c", CLUSTER]
    streams = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    run = subprocess.Popen(words, env={**os.environ, **HERE}, **streams)
    try:
        yield run.stdout.readline().strip()
    finally:
        run.communicate(timeout=PATIENCE)


def test_two_workers_draw_what_generate_draws_and_bad_lines_are_named(tmp_path, expected, capsys, start):
    file, out = tmp_path / "prompts.jsonl", tmp_path / "new" / "out"
    rows = [{"prompt": prompt, "seed": seed} for prompt in PROMPTS for seed in (0, 1)]
    rows += [{"prompt": "a green dragon", "width": 96, "order": "spiral-out"}, {"prompt": "a ball", "width": 100}]
    rows += [{"prompt": "a red ball"}]  # as the first line
    file.write_bytes(b"".join(json.dumps(row).encode() + b"\n" for row in rows) + b'nonsense\n{"prompt": "\xff"}\n')
    home = tmp_path / "home"
    home.mkdir()
    run = start(file, "-o", out, "--workers", 2, HOME=str(home))
    listening = set()
    waited(lambda: pictures(out) or run.poll() is not None)
    own = {process.pid for process in processes("", WORD)}
    listening |= {c.laddr.ip for c in psutil.net_connections("inet") if c.status == "LISTEN" and c.pid in own}
    code, errors = ended(run)
    assert code == 1, errors
    assert listening and {ip.removeprefix("::ffff:") for ip in listening} == {"127.0.0.1"}
    assert list(home.iterdir()) == [] or [p.name for p in home.iterdir()] == [".cache"]
    assert "line 6: --width is 100 pixels, and must be a multiple of 16" in errors
    assert "line 8: it is not valid JSON" in errors and "line 9: the prompt holds bytes that are no text" in errors
    assert "line 5: warning: this model does not know 'dragon'" in errors
    assert "5/5" in errors and "picture/s" in errors.replace("s/picture", "picture/s")
    assert "5 drawn, 0 there before, 3 lines with errors" in errors

    table = manifest(out)
    assert [row["line"] for row in table] == [1, 2, 3, 4, 5, 6, 7, 8, 9]
    assert [row["error"] is None for row in table] == [True] * 5 + [False, True, False, False]
    assert table[6]["file"] == table[0]["file"] and len(pictures(out)) == 5
    assert {p.name for p in out.iterdir()} == {row["file"] for row in table if row["file"]} | {"manifest.jsonl"}
    for row, said in zip(table[:4], rows):
        assert (row["prompt"], row["seed"]) == (said["prompt"], said["seed"]) and row["seconds"] > 0
        assert same(out / row["file"], expected[row["prompt"], row["seed"]])
    with Image.open(out / table[4]["file"]) as image:
        assert image.size == (96, 64)
    waited(lambda: not processes("ray::Worker", WORD) and not processes("raylet", WORD))

    # Again: what is there is left alone, and the manifest is made of it anew.
    times = {picture: picture.stat().st_mtime_ns for picture in pictures(out)}
    (out / "manifest.jsonl").unlink()
    assert main(["batch", str(file), "-o", str(out), *SMALL]) == 1
    assert "0 drawn, 5 there before, 3 lines with errors" in capsys.readouterr().err
    assert manifest(out) == table and times == {picture: picture.stat().st_mtime_ns for picture in pictures(out)}


def test_killed_workers_and_a_killed_run_lose_nothing(tmp_path, expected, cluster, start):
    file, out = tmp_path / "prompts.csv", tmp_path / "out"
    file.write_text("prompt,seed\n" + "".join(f"{prompt},{seed}\n" for prompt, seed in expected))
    moment = random.Random(time.time_ns())

    def killed(name: str, after: int) -> None:
        """Kills one of the workers, some time after so many pictures."""
        waited(lambda: len(pictures(out)) >= after or run.poll() is not None)
        time.sleep(moment.uniform(0, 0.3))
        for process in moment.sample(workers := processes(name, WORD), min(1, len(workers))):
            process.send_signal(signal.SIGKILL)

    join = (file, "-o", out, "--workers", 2, "--ray-address", cluster)
    run = start(*join)
    killed("ray::Worker", 1)
    killed("ray::Worker", 2)
    waited(lambda: len(pictures(out)) >= 4 or run.poll() is not None)
    time.sleep(moment.uniform(0, 0.3))
    run.kill()
    run.communicate()
    # One is damaged, as by a disk; the file of another run stays, and is listed.
    whole = pictures(out)
    whole[0].write_bytes(whole[0].read_bytes()[:-5])
    (out / f"{'0' * 32}.png").write_bytes(whole[1].read_bytes())
    before = {picture: picture.stat().st_mtime_ns for picture in whole[1:]}
    run = start(*join, "--manifest", "parquet")
    waited(lambda: len(pictures(out)) > len(whole) + 1 or run.poll() is not None)
    killed("ray::Worker.draw", len(whole))
    code, errors = ended(run)
    assert code == 0, errors
    table = parquet.read_table(out / "manifest.parquet").to_pylist()
    other = table.pop()
    assert (other["line"], other["file"]) == (None, f"{'0' * 32}.png")
    assert {(row["prompt"], row["seed"]) for row in table} == expected.keys() and len(table) == len(expected)
    files = {row["file"] for row in table}
    assert {p.name for p in out.iterdir()} == files | {other["file"], "manifest.parquet"} and len(files) == len(table)
    assert all(row["error"] is None and row["seconds"] > 0 for row in table)
    assert all(same(out / row["file"], expected[row["prompt"], row["seed"]]) for row in table)
    assert all(picture.stat().st_mtime_ns == then for picture, then in before.items())


def test_a_worker_that_hangs_is_replaced(tmp_path, expected, start):
    file, out = tmp_path / "prompts.csv", tmp_path / "out"
    file.write_text("prompt,seed\n" + "".join(f"{prompt},{seed}\n" for prompt, seed in expected))
    run = start(file, "-o", out, "--workers", 2, "--timeout", 25)
    waited(lambda: pictures(out) or run.poll() is not None)
    waited(lambda: (found := processes("ray::Worker.draw", WORD)) and not found[0].suspend())
    code, errors = ended(run)
    assert code == 0, errors
    assert {(row["prompt"], row["seed"]) for row in manifest(out)} == expected.keys()
    waited(lambda: not processes("ray::Worker", WORD))


def test_memory_that_ran_out_is_one_sentence_and_all_else_is_raised():
    with pytest.raises(RuntimeError) as much:
        torch.empty(2**62, dtype=torch.uint8)
    assert workers.sentence(much.value) == "Out of memory: a smaller canvas needs less."
    assert workers.sentence(ValueError("two\nlines")) == "two lines"
    with pytest.raises(KeyError):
        workers.sentence(KeyError("of the worker's own"))


@pytest.mark.parametrize(
    "argv, words",
    [
        (("--ray-address", "127.0.0.1:9"), "--ray-address 127.0.0.1:9: no cluster answers there"),
        (("--ray-address", "ray://127.0.0.1:9"), "--ray-address ray://127.0.0.1:9 is of Ray's client"),
        (("--gpus-per-worker", "99"), "--gpus-per-worker is 99, and this machine has"),
        (("--model", "no/such/folder"), "--model no/such/folder: there is no such folder or file"),
        (("--ray-address", "auto", "--device", "cuda:1"), "--device cuda:1 names one device"),
        (("--device", "cuda", "--workers", "3", "--gpus-per-worker", "0.5"), "--device cuda is not on this machine"),
    ],
    ids=["nobody", "client", "GPUs", "model", "one device", "no GPU"],
)
def test_what_cannot_be_done_is_one_sentence(tmp_path, capsys, monkeypatch, argv, words):
    for name, value in HERE.items():  # which the command sets itself; put back afterwards
        monkeypatch.setenv(name, value)
    (tmp_path / "p.txt").write_text("a red ball\n")
    assert main(["batch", str(tmp_path / "p.txt"), "-o", str(tmp_path / "out"), *argv]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"rolling-diffusion: {words}") and error.count("\n") == 1
    assert not any((tmp_path / "out").glob("*"))


def test_a_model_of_the_hub_is_known_by_its_revision(tmp_path, monkeypatch):
    from huggingface_hub import constants

    folder = tmp_path / "models--one--model"
    (folder / "snapshots" / "abc123").mkdir(parents=True)
    (folder / "snapshots" / "abc123" / "model_index.json").write_text("{}")
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("abc123")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert batch.revision_of("one/model") == "one/model@abc123"
    with pytest.raises(ValueError, match="the hub tells no revision of another/model"):
        batch.revision_of("another/model")


def test_workers_that_would_wait_for_gpus_for_ever_are_refused(monkeypatch):
    for name, value in HERE.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match="2 workers of 1 GPUs each are more than this machine's 1: take 1"):
        workers.Cluster(None, 2, None, None, "cuda")
    with pytest.raises(ValueError, match=r"4 workers of 0\.5 GPUs each .* take 2"):
        workers.Cluster(None, 4, 0.5, None, "cuda")


@pytest.mark.parametrize("manifest", ["jsonl", "parquet"])
def test_the_prompts_are_no_manifest(tmp_path, capsys, manifest):
    if manifest == "parquet":
        pytest.importorskip("pyarrow")
    file = tmp_path / "manifest.jsonl"
    file.write_text('{"prompt": "a ball"}\n')
    assert main(["batch", str(file), "-o", str(tmp_path), "--manifest", manifest]) == 2
    assert "PROMPTS and the manifest both name" in capsys.readouterr().err
    assert file.read_text() == '{"prompt": "a ball"}\n'


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
@pytest.mark.parametrize("table", ["jsonl", "parquet"])
def test_a_line_with_an_error_keeps_its_prompt_and_foreign_pictures_stop_nothing(tmp_path, capsys, kind, table):
    """Nothing is drawn: no cluster is needed."""
    file, out = tmp_path / f"p.{kind}", tmp_path / "out"
    rows = [
        ("a red ball", "seed", "-1"),
        ("a blue boat", "width", "100"),
        ("b\udcffd", "seed", "-1"),
        ("", "seed", "1"),
    ]
    if kind == "jsonl":
        lines = [f'{{"prompt": "{prompt}", "{name}": {value}}}\n' for prompt, name, value in rows]
        lines += ["nonsense\n", '{"prompt": 5}\n']
    else:
        lines = ["prompt,seed,width\n"]
        lines += [f"{prompt},{value if name == 'seed' else ',' + value}\n" for prompt, name, value in rows]
    file.write_bytes("".join(lines).encode(errors="surrogateescape"))
    out.mkdir()
    foreign = [{"said": value} for value in (None, [], 5, {"prompt": 5}, {"prompt": "\ud800"}, {"seed": "x"})]
    foreign += [{"said": {"seed": value}} for value in (-1, 2**64, True)]
    foreign += [[], 5, {"seconds": float("nan")}, {"seconds": "x"}, {"seconds": 10**400}]
    for number, record in enumerate([*foreign, {"said": {"prompt": "a house", "seed": 7}, "seconds": 1.5}]):
        save_png(out / f"{number:032x}.png", Image.new("RGB", (8, 8)), record)
    before = {picture: picture.read_bytes() for picture in pictures(out)}
    assert main(["batch", str(file), "-o", str(out), "--manifest", table]) == 1
    assert f"0 drawn, 0 there before, {len(lines) - (kind == 'csv')} lines with errors" in capsys.readouterr().err
    read = manifest(out) if table == "jsonl" else parquet.read_table(out / "manifest.parquet").to_pylist()
    assert [row["prompt"] for row in read if row["error"]][:4] == ["a red ball", "a blue boat", None, None]
    assert all(row["prompt"] is None for row in read[4:-1])
    others = [(row["file"], row["prompt"], row["seed"], row["seconds"]) for row in read if not row["error"]]
    assert others == [(f"{len(foreign):032x}.png", "a house", 7, 1.5)]
    assert before == {picture: picture.read_bytes() for picture in pictures(out)}


def test_one_line_with_errors_is_one_line(tmp_path, capsys):
    (tmp_path / "p.jsonl").write_text('{"prompt": "a red ball", "width": 100}\n')
    assert main(["batch", str(tmp_path / "p.jsonl"), "-o", str(tmp_path / "out")]) == 1
    assert "0 drawn, 0 there before, 1 line with errors" in capsys.readouterr().err
