"""One canvas drawn by two processes, over gloo on the CPU: the picture of one, with half of its memory in each."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("diffusers")
if not hasattr(torch, "accelerator"):
    pytest.skip("torch before 2.6 has no torch.accelerator, which diffusers asks", allow_module_level=True)

from own_ranks import NAMES, WAYS

from rolling_diffusion.cli import main

ROOT = Path(__file__).parent.parent
LOOPBACK = "lo0" if sys.platform == "darwin" else "lo"
SMALL = ("--width", "64", "--height", "96", "--steps", "3", "--window", "8", "--overlap", "4", "--device", "cpu")


def torchrun(*words: str) -> subprocess.CompletedProcess:
    """Two processes of this machine, which meet on loopback."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *words]
    here = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": LOOPBACK, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    return subprocess.run(command, env=os.environ | here, capture_output=True, text=True, timeout=600)


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    file = tmp_path_factory.mktemp("together") / "told.json"
    done = torchrun(str(ROOT / "tests" / "own_ranks.py"), str(file))
    assert done.returncode == 0, done.stderr
    return json.loads(file.read_text())


@pytest.mark.parametrize("name", NAMES)
def test_two_processes_draw_the_picture_of_one_with_half_its_memory_each(told, name):
    assert max(told[name]["ordinary"]) < 1e-5
    for way in WAYS:
        away, alone, each = told[name][way]
        assert away < 1e-5 and each == alone / 2 > 0, (way, away, alone, each)


def test_even_shares_take_what_rolls_unevenly_and_stay_even(told):
    away, anything = told["evenly"]
    assert away < 1e-5 and anything is False


@pytest.mark.parametrize(
    "why, words",
    [
        ("no plan", "diffusers has no plan of how SD3Transformer2DModel is shared out: leave torchrun out"),
        ("no generator", "give a generator, with the same seed in each"),
        ("control", "what a ControlNet adds is not shared out"),
        ("ring", "take Ulysses, ContextParallelConfig(ulysses_degree=…, ulysses_anything=True)"),
        ("compiled", "leave torch.compile out"),
        ("few", "blocks in motion have 1 tokens, and 2 processes share them"),
    ],
)
def test_what_processes_cannot_share_is_one_sentence(told, why, words):
    assert words in told["refused"][why]


def test_generate_under_torchrun_draws_what_generate_draws(tmp_path):
    argv = ["generate", "a red ball above a blue boat", "--seed", "3", *SMALL]
    assert main([*argv, "-o", str(tmp_path / "one.png"), "--report", str(tmp_path / "one.json")]) == 0
    two = [str(tmp_path / name) for name in ("two.png", "two.json", "a.gif")]
    done = torchrun("-m", "rolling_diffusion.cli", *argv, "-o", two[0], "--report", two[1], "--animation", two[2])
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [two[0], two[2], two[1]]  # once, not twice
    assert {path.name for path in tmp_path.iterdir()} == {"one.png", "one.json", "two.png", "two.json", "a.gif"}
    one, both = (np.asarray(Image.open(tmp_path / f"{name}.png")).astype(int) for name in ("one", "two"))
    assert np.abs(one - both).max() <= 1 and (one != both).mean() < 1e-3  # where 1e-5 rounds to another byte
    reports = [json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two")]
    assert [report["processes"] for report in reports] == [1, 2]
    alone, each = (report["pictures"][0]["memory_bytes"] for report in reports)
    assert each == alone / 2 and "note: memory of keys and values is" in done.stderr


def test_bad_input_under_torchrun_is_said_once():
    done = torchrun("-m", "rolling_diffusion.cli", "generate", "a ball", "--width", "100")
    assert done.returncode == 1  # torchrun's own
    assert done.stderr.count("rolling-diffusion: --width is 100 pixels") == 1


def test_other_commands_want_one_process(monkeypatch, capsys):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert main(["serve"]) == 2
    assert "serve takes one process" in capsys.readouterr().err
