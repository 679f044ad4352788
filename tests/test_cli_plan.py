"""`rolling-diffusion plan`, and the settings that every command shares."""

import json
import os
import subprocess
import sys

import pytest
from PIL import Image

from rolling_diffusion.cli import main
from rolling_diffusion.cli.files import read_record
from rolling_diffusion.core.plan import make_plan


def said(capsys, *argv: str) -> str:
    assert main(["plan", *argv]) == 0
    return capsys.readouterr().out


def test_the_table_is_the_plans_own_cost(capsys):
    out = said(capsys, "--width", "512", "--height", "1024", "--steps", "28", "--draft", "7", "--text-tokens", "512")
    plan = make_plan(128, 64, 28, window=64, overlap=32, draft=7, lookahead=64)
    cost = plan.cost(512)
    row = next(line for line in out.splitlines() if line.startswith("this plan"))
    calls, tokens, moving, visible, evaluations, relative = row.removeprefix("this plan").replace("×", "").split()
    assert int(calls) == cost.ticks + cost.waiting_calls + cost.commits
    assert int(tokens.replace(",", "")) == round(cost.tokens_per_tick)
    assert int(moving.replace(",", "")) == cost.peak_moving_tokens
    assert int(visible.replace(",", "")) == cost.peak_visible_tokens
    assert int(evaluations.replace(",", "")) == cost.token_evaluations
    assert float(relative) == round(cost.relative, 2)
    full = next(line for line in out.splitlines() if line.startswith("full")).split()
    assert full[1] == "28" and full[-2] == "1.00"


def test_the_default_run_rolls(capsys, tmp_path):
    file = tmp_path / "plan.json"
    said(capsys, "--json", str(file))
    plan = json.loads(file.read_text())["plan"]
    names = ("height", "width", "window", "overlap", "draft", "lag")
    assert tuple(plan[name] for name in names) == (32, 32, 16, 8, 10, 5)


def test_another_model_brings_its_own_habits(capsys):
    out = said(capsys, "--model", "black-forest-labs/FLUX.1-dev")
    assert "1024 × 1024 pixels" in out and "28 a block, 14 of them in the draft" in out and "512 of text" in out


def test_a_canvas_beyond_the_models_own_looks_one_window_ahead(capsys):
    assert "waiting blocks: the whole canvas" in said(capsys)
    assert "waiting blocks: 128 cells" in said(capsys, "--height", "2048")
    assert "waiting blocks: the whole canvas" in said(capsys, "--height", "2048", "--lookahead", "all")
    assert "waiting blocks: nothing" in said(capsys, "--lookahead", "0")


def test_a_window_alone_brings_half_of_it_as_overlap(capsys):
    assert "window   24 cells, overlap 12:" in said(capsys, "--window", "24")
    assert "window   6 cells, overlap 2:" in said(capsys, "--window", "6")


def test_the_picture_shows_the_plan_and_keeps_its_settings(capsys, tmp_path):
    file = tmp_path / "plan.png"
    said(capsys, "--order", "spiral-out", "-o", str(file))
    with Image.open(file) as image:
        assert image.size == (1600, 880)
    kept = read_record(file)
    assert kept["said"] == {"order": "spiral-out"} and kept["fitted"]["window"] == 16
    assert list(tmp_path.iterdir()) == [file]


def test_an_order_that_is_decided_late_is_said_to_be(capsys, tmp_path):
    file = tmp_path / "plan.json"
    out = said(capsys, "--order", "difficulty", "--extrapolation", "0.4", "--json", str(file))
    assert "16 of 8 × 8 cells, difficulty, decided at the end of the draft" in out
    assert "waiting blocks: the whole canvas, extrapolated by 0.4" in out
    random = said(capsys, "--order", "random")
    assert [line for line in out.splitlines() if "×" in line][-3:] == [
        line for line in random.splitlines() if "×" in line
    ][-3:]  # it costs what any way over these tiles costs
    assert json.loads(file.read_text())["plan"]["order"] == "difficulty"
    assert "decided" not in said(capsys, "--order", "difficulty", "--lag", "0")


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--order", "difficulty", "--draft", "1"], ["draft is 1 steps", "needs at least 2"]),
        (["--extrapolation", "1.2"], ["--extrapolation", "from 0 to 1"]),
        (["--extrapolation", "0.4", "--draft", "0"], ["extrapolation is 0.4", "needs a draft"]),
        (["--window", "1"], ["window is 1 cells", "multiple of 2"]),
        (["--window", "16", "--overlap", "16"], ["overlap is 16", "below the window of 16"]),
        (["--width", "250"], ["--width is 250 pixels", "multiple of 16", "240 or 256"]),
        (["--height", "8"], ["--height is 8 pixels", "take 16"]),
        (["--order", "sprial-out"], ["did you mean 'spiral-out'?", "raster"]),
        (["--steps", "0"], ["--steps", "from 1 to 10000"]),
        (["--steps", "x"], ["--steps", "whole number"]),
        (["--steps", "1" + "0" * 30], ["--steps must be a whole number from 1 to 10000"]),
        (["--width", "16" + "0" * 400], ["--width must be a whole number from 1 to 9223372036854775807"]),
        (["--persistence", "0_1"], ["--persistence must be a number from 0 to 1"]),
        (["--draft", "20"], ["draft is 20 steps", "from 0 to 19"]),
        (["--persistence", "1.5"], ["--persistence", "from 0 to 1"]),
        (["--persistence", "nan"], ["--persistence", "from 0 to 1"]),
        (["--lag", "fast"], ["--lag", "'autoregressive'"]),
        (["--lag", "21"], ["lag is 21", "from 0 to 10"]),
        (["--ordre", "raster"], ["no option --ordre", "did you mean '--order'?"]),
        (["raster"], ["no use for 'raster'"]),
        (["-o", "/nowhere/plan.png"], ["/nowhere/plan.png", "no folder /nowhere"]),
        (["-o", "q.png", "--json", "q.png"], ["--output and --json both name q.png"]),
        (["-o", "plan.txt"], ["plan.txt", "must end in .png"]),
        (["--seed", "-1"], ["--seed", "from 0 to 18446744073709551615"]),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(capsys, argv, words):
    code = main(["plan", *argv])
    error = capsys.readouterr().err
    assert code == 2
    assert error.count("\n") == 1 and error.startswith("rolling-diffusion")
    assert all(word in error for word in words), error


def test_a_misspelled_command_is_named(capsys):
    assert main(["paln"]) == 2
    assert "did you mean 'plan'?" in capsys.readouterr().err


def test_no_command_shows_the_help(capsys):
    assert main([]) == 0
    assert "plan" in capsys.readouterr().out


def test_a_reader_that_has_left_is_no_traceback():
    """As in `rolling-diffusion plan | head -1`."""
    read, write = os.pipe()
    os.close(read)
    program = "from rolling_diffusion.cli import main; raise SystemExit(main(['plan']))"
    done = subprocess.run([sys.executable, "-c", program], stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    assert (done.returncode, done.stderr) == (1, b"")


def run(*argv: str, stdout: str, **environment: str) -> subprocess.CompletedProcess:
    """The program in a shell, its output led where it says."""
    program = "import sys; from rolling_diffusion.cli import main; sys.exit(main())"
    command = 'exec "$0" -c "$1" "${@:2}" ' + stdout
    words = ["bash", "-c", command, sys.executable, program, *argv]
    return subprocess.run(words, capture_output=True, env={**os.environ, **environment})


@pytest.mark.parametrize(("argv", "unbuffered"), [(["plan"], ""), (["plan"], "1"), (["--help"], "")])
def test_an_output_that_is_full_is_one_sentence(argv, unbuffered):
    done = run(*argv, stdout=">/dev/full", PYTHONUNBUFFERED=unbuffered)
    sentence = "rolling-diffusion: cannot read or write: No space left on device\n"
    assert (done.returncode, done.stderr.decode()) == (1, sentence)


def test_an_output_that_is_closed_is_one_sentence():
    done = run("plan", stdout=">&-")
    assert (done.returncode, done.stderr.count(b"\n")) == (1, 1) and b"its output is closed" in done.stderr


@pytest.mark.parametrize("encoding", ["cp1251", "ascii", "cp1252"])
def test_any_terminal_can_show_a_plan(encoding):
    done = run("plan", stdout="", PYTHONIOENCODING=encoding)
    assert done.returncode == 0 and not done.stderr
    assert b"256 x 256 pixels" in done.stdout.replace(b"\xd7", b"x")


@pytest.mark.skipif(sys.platform == "win32", reason="there a folder that is in use stays")
def test_a_folder_that_is_gone_is_one_sentence(tmp_path):
    (tmp_path / "gone").mkdir()
    command = f"cd {tmp_path}/gone && rmdir {tmp_path}/gone && {sys.executable} -m rolling_diffusion.cli plan"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True)
    assert done.returncode == 2 and "the folder that this was called in is gone" in done.stderr
