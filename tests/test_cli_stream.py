"""`rolling-diffusion stream`: files that grow, and go on after whatever ended the run."""

import itertools
import json
import os
import random
import shutil
import signal
import time
import tracemalloc
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from own_stream import start
from PIL import Image

from rolling_diffusion.cli import growing, main
from rolling_diffusion.cli.files import HOST, read_record, save_json, save_png
from rolling_diffusion.recording import KEY

tifffile = pytest.importorskip("tifffile")

KILLS = int(os.environ.get("ROLLING_KILLS", "3"))  # 20 take minutes
TINY = ("--across", "32", "--stretch", "32", "--steps", "2", "--device", "cpu")
LONG = ("a red ball", "--length", "256", *TINY)


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    return tmp_path


@pytest.fixture(scope="module", autouse=True)
def loaded():
    """The embedded model, loaded once."""
    from rolling_diffusion.cli import stream

    real, made = stream.load_said, {}

    def load(folder, said, start=None):
        made.setdefault(folder, None)
        if made[folder] is None:
            made[folder] = real(folder, said)
        return made[folder]

    stream.load_said = load
    yield
    stream.load_said = real


def pixels(file) -> np.ndarray:
    with Image.open(file) as image:
        return np.asarray(image)


def whole(folder: Path, axis: int, backwards: bool = False) -> np.ndarray:
    slices = [pixels(file) for file in sorted(folder.glob("*.png"))]
    return np.concatenate(slices[::-1] if backwards else slices, axis)


def refused(capsys, *argv: str, code: int = 2) -> str:
    assert main(["stream", *argv]) == code
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("rolling-diffusion"), error
    return error


@pytest.mark.parametrize(
    "argv, words",
    [
        (["-o", "x.png"], ["a prompt is needed", "stream"]),
        ([" ", "--length", "64", "-o", "x.png"], ["a prompt is needed"]),
        (["a ball", "-o", "x.png"], ["--length is missing"]),
        (["a ball", "--prompts", "two.txt", "-o", "x.png"], ["PROMPT", "--prompts", "say one"]),
        (["a ball", "--length", "1000", "-o", "x.png"], ["--length is 1000 pixels", "multiple of 16", "992 or 1008"]),
        (["a ball", "--length", "64", "--across", "100", "-o", "x.png"], ["--across is 100", "96 or 112"]),
        (["a ball", "--length", "64", "--stretch", "8", "-o", "x.png"], ["--stretch is 8", "take 16"]),
        (["a ball", "--length", "64", "--context", "24", "-o", "x.png"], ["--context is 24", "16 or 32"]),
        (["a ball", "--length", "64", "--order", "spiral-out", "-o", "x.png"], ["--order", "top-to-bottom"]),
        (["a ball", "--length", "64", "-o", "x.jpg"], ["x.jpg must end in .png, .tif, .tiff, or be a folder"]),
        (["a ball", "--length", "64", "-o", "no/x.png"], ["no folder", "no"]),
        (["a ball", "--length", "64", "--slice", "9", "-o", "x.png"], ["--slice is of a folder"]),
        (["a ball", "--length", "64", "--pyramid", "-o", "x.png"], ["--pyramid is of a .tif"]),
        (["a ball", "--length", "64", "--pyramid", "-o", "x"], ["--pyramid is of a .tif"]),
        (["a ball", "--length", "64", "--width", "64", "-o", "x"], ["no option --width"]),
        (["a ball", "--length", "64", "--across", "1600000000", "-o", "x"], ["GiB of memory", "smaller --across"]),
        (["--prompts", "no.txt", "-o", "x"], ["cannot read no.txt"]),
        (["--prompts", "x.csv", "-o", "x"], ["x.csv must end in .txt", ".json"]),
        (["--prompts", "empty.txt", "-o", "x"], ["empty.txt: prompts must be a list, with one at least"]),
        (["--prompts", "bad.json", "-o", "x"], ["bad.json is not valid JSON"]),
        (["--prompts", "mixed.json", "--length", "64", "-o", "x"], ["prompt 2 is", "must be [PLACE"]),
        (["--prompts", "late.json", "--length", "64", "-o", "x"], ["begins at", "must begin at 0"]),
        (["--prompts", "back.json", "--length", "64", "-o", "x"], ["'b'", "beyond the one before"]),
        (["--prompts", "far.json", "--length", "64", "-o", "x"], ["'b'", "within"]),
        (["--prompts", "odd.json", "--length", "64", "-o", "x"], ["the place of 'b' is 30 pixels", "16 or 32"]),
        (["--prompts", "share.json", "--length", "64", "-o", "x"], ["'b' is 1.5", "from 0 to below 1"]),
        (["--prompts", "far.json", "-o", "x"], ["--length is missing"]),
        (["--prompts", "two.txt", "--length", "16", "-o", "x"], ["2 prompts go beyond a --length of 16"]),
        (["--from", "no.png", "-o", "x"], ["there is no file no.png"]),
        (["a ball", "--length", "64", "-o", "mine.png"], ["mine.png is there already", "no stream", "another output"]),
        (["a ball", "--length", "64", "-o", "mine.tif"], ["mine.tif is there already"]),
        (["a ball", "--length", "64", "-o", "folder"], ["folder is there already"]),
        (["a ball", "--length", "64", "-o", "plain"], ["plain is a file"]),
    ],
)
def test_bad_input_is_one_sentence_and_nothing_is_lost(capsys, here, argv, words):
    for name, entries in {
        "mixed": ["a", [0.5, "b"]],
        "late": [[16, "a"]],
        "back": [[0, "a"], [32, "c"], [16, "b"]],
        "far": [[0, "a"], [64, "b"]],
        "odd": [[0, "a"], [30, "b"]],
        "share": [[0, "a"], [1.5, "b"]],
    }.items():
        (here / f"{name}.json").write_text(json.dumps([[0, "a"], *entries[1:]] if name == "mixed" else entries))
    (here / "mixed.json").write_text(json.dumps([[0, "a"], "b"]))
    (here / "bad.json").write_text("[")
    (here / "two.txt").write_text("a red ball\n\na blue boat\n")
    for name in ("empty.txt", "x.csv", "mine.tif", "plain"):
        (here / name).touch()
    Image.new("RGB", (8, 8)).save("mine.png")
    (here / "folder").mkdir()
    (here / "folder" / "letter.txt").write_text("dear")
    before = {file: file.read_bytes() for file in here.rglob("*") if file.is_file()}
    error = refused(capsys, *argv)
    assert all(word in error for word in words), error
    assert before == {file: file.read_bytes() for file in here.rglob("*") if file.is_file()}


@pytest.mark.parametrize("order", ["left-to-right", "right-to-left", "top-to-bottom", "bottom-to-top"])
def test_all_files_hold_the_same_pixels(here, capsys, order):
    (here / "p.json").write_text(json.dumps([[0, "a red ball"], [0.3, "a blue boat"], [192, "a green tree"]]))
    said = ("--prompts", "p.json", "--length", "256", *TINY, "--order", order, "--context", "32")
    assert main(["stream", *said, "-o", "one.png"]) == 0
    assert main(["stream", *said, "-o", "one.tif"]) == 0
    assert main(["stream", "--from", "one.tif", "-o", "slices", "--slice", "100", "--device", "cpu"]) == 0
    assert capsys.readouterr().out.split() == ["one.png", "one.tif", "slices"]
    down, backwards = order.endswith(("top", "bottom")), order in ("right-to-left", "bottom-to-top")
    picture = pixels("one.png")
    assert picture.shape == ((256, 32, 3) if down else (32, 256, 3))
    assert np.array_equal(picture, pixels("one.tif")) and np.array_equal(picture, tifffile.imread("one.tif"))
    assert np.array_equal(picture, whole(here / "slices", 0 if down else 1, backwards))
    assert sorted(file.name for file in (here / "slices").iterdir()) == [
        *("0001.png", "0002.png", "0003.png", "settings.json")
    ]
    assert sorted(file.name for file in here.iterdir()) == ["one.png", "one.tif", "p.json", "slices"]
    first, second = read_record(Path("one.png")), read_record(Path("slices"))
    assert first["said"]["prompts"] == [[0, "a red ball"], [0.3, "a blue boat"], [192, "a green tree"]]
    assert second["said"] == first["said"] | {"slice": 100} and second["stream"] == {"written": 256, "length": 256}
    assert read_record(here / "slices" / "0001.png")["said"] == second["said"]


def test_a_line_is_a_stretch_or_its_share_of_the_length(here):
    (here / "lines.txt").write_text("a red ball\na blue boat\n")
    assert main(["stream", "--prompts", "lines.txt", *TINY, "-o", "one.png"]) == 0
    assert pixels("one.png").shape == (32, 64, 3)
    assert main(["stream", "--prompts", "lines.txt", *TINY, "--length", "64", "-o", "two.png"]) == 0
    assert np.array_equal(pixels("one.png"), pixels("two.png"))
    assert main(["stream", "--from", "one.png", "--length", "80", "-o", "three.png", "--device", "cpu"]) == 0
    assert pixels("three.png").shape == (32, 80, 3)


def test_what_is_finished_is_not_drawn_again_and_other_settings_are_refused(here, capsys):
    assert main(["stream", *LONG, "-o", "one.png"]) == 0
    before = (here / "one.png").read_bytes()
    assert main(["stream", *LONG, "-o", "one.png"]) == 0
    assert "finished before" in capsys.readouterr().err
    error = refused(capsys, *LONG, "--seed", "1", "-o", "one.png")
    assert "one.png holds a stream of other settings (seed was 0, and is now 1): say the same" in error
    assert (here / "one.png").read_bytes() == before


def test_a_picture_of_one_prompt_begins_as_generate_draws_it(here):
    """The first stretch sees nothing before it."""
    said = ("--steps", "2", "--device", "cpu")
    assert (
        main(["stream", "a red ball", "--length", "64", "--across", "64", "--stretch", "64", *said, "-o", "s.png"]) == 0
    )
    from rolling_diffusion.core.cohort import block_seed
    from rolling_diffusion.core.order import Block

    seed = str(block_seed(0, Block(0, 0, 0, 0, 0)) % 2**63)
    size = ("--width", "64", "--height", "64", "--order", "left-to-right")
    assert main(["generate", "a red ball", *size, *said, "--seed", seed, "-o", "g.png"]) == 0
    assert np.array_equal(pixels("s.png"), pixels("g.png"))


# Files alone: strips of noise, of uneven lengths.

STRIPS = (24, 40, 1, 200, 64, 71)  # 400 pixels, across 37


def strips(axis: int, backwards: bool) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = [(n, 37, 3) if axis == 0 else (37, n, 3) for n in STRIPS]
    found = [(rng.integers(0, 40, shape).cumsum(1 - axis) % 256).astype(np.uint8) for shape in shapes]
    return found


def fill(path: Path, axis: int, backwards: bool) -> None:
    """What a run does with its output, from wherever it is."""
    output = growing.open_output(path, axis, backwards, None if path.suffix else 90, path.suffix == ".tif")
    with closing(output):
        state, finished = output.begin({"said": {"seed": 1}, "fitted": {}, "machine": {}}, 37, sum(STRIPS))
        if finished:
            return
        start = 0
        for number, strip in enumerate(strips(axis, backwards)):
            if output.written <= start:
                last = number == len(STRIPS) - 1
                output.add(start, strip, None if last else {"number": torch.tensor(number + 1)})
            else:
                assert state is not None
            start += strip.shape[axis]
        output.finish()


def content(path: Path) -> dict[str, bytes]:
    """Everything that is there."""
    return {str(file.relative_to(path.parent)): file.read_bytes() for file in sorted(path.parent.rglob("*.*"))}


@pytest.mark.parametrize("axis, backwards", itertools.product((0, 1), (False, True)))
@pytest.mark.parametrize("name", ["x.png", "x.tif", "x"])
def test_whatever_write_is_the_last_the_file_is_the_same(here, monkeypatch, name, axis, backwards):
    class Killed(BaseException):
        pass

    (here / "whole").mkdir()
    fill(here / "whole" / name, axis, backwards)
    expected = strips(axis, backwards)
    picture = np.concatenate(expected[::-1] if backwards else expected, axis)
    if name == "x":
        assert np.array_equal(whole(here / "whole" / "x", axis, backwards), picture)
    else:
        assert np.array_equal(pixels(here / "whole" / name), picture)
    left = [0]

    def counted(real):
        def call(*args):
            if left[0] == 0:
                raise Killed
            left[0] -= 1
            return real(*args)

        return call

    monkeypatch.setattr(os, "replace", counted(os.replace))
    monkeypatch.setattr(os, "fsync", counted(os.fsync))
    monkeypatch.setattr(growing.Canvas, "write", counted(growing.Canvas.write))
    real = Path.unlink

    def unlink(path, missing_ok=False):  # what is killed in it has done it
        real(path, missing_ok=missing_ok)
        counted(lambda: None)()

    monkeypatch.setattr(Path, "unlink", unlink)
    for last in itertools.count():
        folder = here / str(last)
        folder.mkdir()
        left[0] = last
        try:
            fill(folder / name, axis, backwards)
            break
        except Killed:
            left[0] = 10**6
            fill(folder / name, axis, backwards)
        assert content(folder / name) == content(here / "whole" / name), last
    assert last > 2 * len(STRIPS)


def test_what_a_killed_run_was_writing_is_swept(here):
    (here / "x").mkdir()
    for name in ("settings.json", "0001.png", "state.safetensors"):
        (here / "x" / f".{name}.{HOST}.99999999.part").write_bytes(b"half")
    fill(here / "x", 0, False)
    assert not list((here / "x").glob(".*")) and len(list((here / "x").iterdir())) == 6


def test_a_pyramid_holds_means_and_tiles_in_a_big_tiff(here):
    axis = 1
    fill(here / "x.tif", axis, False)
    with tifffile.TiffFile("x.tif") as file:
        assert file.is_bigtiff and file.pages[0].is_tiled and len(file.pages) == 1
        levels = [level.asarray() for level in file.series[0].levels]
    assert [level.shape for level in levels] == [(37, 400, 3), (19, 200, 3)]
    corner = levels[0][:2, :2].astype(int).sum((0, 1))
    assert np.array_equal(levels[1][0, 0], (corner + 2) // 4)
    last = levels[0][36, :2].astype(int).sum(0)  # of the odd row, twice
    assert np.array_equal(levels[1][18, 0], (2 * last + 2) // 4)


def test_a_png_of_many_bands_is_the_canvas(here, monkeypatch):
    monkeypatch.setattr(growing, "BAND", 1000)
    monkeypatch.setattr(growing, "CHUNK", 64)
    picture = np.concatenate(strips(0, False), 0)
    with growing.Canvas(here / "x.raw", *picture.shape[:2]) as canvas:
        canvas.write(0, 0, picture)
        growing.write_png(here / "x.png", canvas, (3, 5, 301, 30), {"said": {}})
        assert np.array_equal(pixels("x.png"), picture[3:304, 5:35])
        Image.fromarray(picture[3:304, 5:35]).save("pillow.png")
    assert (here / "x.png").stat().st_size < 1.1 * (here / "pillow.png").stat().st_size + 2000


@pytest.mark.parametrize("shape", [(60, 200_000), (200_000, 60)], ids=["wide", "tall"])
def test_files_of_huge_canvases_are_written_in_little_memory(here, shape):
    with growing.Canvas(here / "x.raw", *shape) as canvas:
        rows = np.random.default_rng(0).integers(0, 256, (1, shape[1], 3), dtype=np.uint8)
        for row in range(0, shape[0], 30):
            canvas.write(row, 0, rows)
        tracemalloc.start()
        growing.write_png(here / "x.png", canvas, (0, 0, *shape), {})
        growing.write_tiff(here / "x.tif", canvas, (0, 0, *shape), {}, pyramid=True)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 12 * 2**20  # of 34 MiB of pixels
    assert np.array_equal(pixels("x.png"), pixels("x.tif"))


def test_a_full_disk_is_one_sentence_and_the_run_goes_on_when_there_is_room(here, capsys, monkeypatch):
    assert main(["stream", *LONG, "-o", "whole.png"]) == 0
    real, left = os.fsync, [5]

    def fsync(number):
        left[0] -= 1
        if left[0] == 0:
            raise OSError(28, "No space left on device")
        real(number)

    monkeypatch.setattr(os, "fsync", fsync)
    capsys.readouterr()
    error = refused(capsys, *LONG, "-o", "one.png", code=1)
    assert (
        "cannot write one.png: No space left on device" in error and "are kept, and the same command goes on" in error
    )
    assert main(["stream", *LONG, "-o", "one.png"]) == 0
    assert "goes on after" in capsys.readouterr().err
    assert (here / "one.png").read_bytes() == (here / "whole.png").read_bytes()
    assert sorted(file.name for file in here.iterdir()) == ["one.png", "whole.png"]


def test_a_full_disk_is_one_sentence_while_the_state_is_written_too(here, capsys, monkeypatch):
    real, left = Path.write_bytes, [2]

    def write_bytes(path, content):
        left[0] -= 1
        if left[0] == 0:
            raise OSError(28, "No space left on device")
        return real(path, content)

    monkeypatch.setattr(Path, "write_bytes", write_bytes)
    assert "cannot write one.png: No space left on device" in refused(capsys, *LONG, "-o", "one.png", code=1)
    assert main(["stream", *LONG, "-o", "one.png"]) == 0 and main(["stream", *LONG, "-o", "two.png"]) == 0
    assert np.array_equal(pixels("one.png"), pixels("two.png"))


def test_what_is_stopped_between_a_slice_and_its_state_leaves_no_wrong_slice(here, monkeypatch):
    """Ctrl-C while the state is written."""
    output = growing.open_output(here / "x", 1, False, 90, False)
    output.begin({"said": {"seed": 1}, "fitted": {}, "machine": {}}, 37, sum(STRIPS))

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(growing, "place", stop)
    with pytest.raises(KeyboardInterrupt):
        output.add(0, strips(1, False)[1], {"number": torch.tensor(1)})
    monkeypatch.undo()
    output.show()
    assert [file.name for file in (here / "x").glob("*.png")] == ["0001.png"]


def test_pixels_that_are_gone_are_not_taken_for_black(here, capsys, monkeypatch):
    process = start(("stream", *LONG, "-o", "one.png"), here)
    while not list(here.glob("one*/state*")):
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    (here / "one.png.unfinished" / "pixels.raw").unlink()
    assert "pixels.raw is gone, and is needed to go on" in refused(capsys, *LONG, "-o", "one.png")


def test_a_length_beyond_all_disks_is_one_sentence(here, capsys):
    length = str(16 * 10**15)
    error = refused(capsys, "a ball", "--length", length, *TINY, "-o", "one.tif")
    assert "MiB for the pixels alone" in error


def test_a_disk_that_is_too_small_is_seen_before(here, capsys, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 0))
    assert "its disk has 0 MiB" in refused(capsys, *LONG, "-o", "one.png")


def test_a_state_that_is_damaged_or_of_other_settings_is_refused(here, capsys, monkeypatch):
    monkeypatch.setattr(growing.Output, "finish", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["stream", *LONG, "-o", "one.png"])
    error = refused(capsys, *LONG, "--order", "right-to-left", "-o", "one.png")
    assert "one.png.unfinished holds a stream of other settings (order was" in error
    state = here / "one.png.unfinished" / "state.safetensors"
    state.write_bytes(b"")
    assert "state.safetensors cannot be read" in refused(capsys, *LONG, "-o", "one.png")


SHORT = ("a red ball", "--length", "64", *TINY)
SPOILT = [
    *(
        {"stream": value}
        for value in ({}, {"written": 64}, {"written": None, "length": 64}, {"written": 64, "length": 8})
    ),
    *({"stream": {"written": value, "length": 64}} for value in ("x", "64", 64.0, 1e9, 10**9, -64, True, [64])),
    *({name: value} for name in ("said", "fitted", "machine") for value in (None, [1], 5)),
    {"stream": {"written": 64, "length": 96}},
]


def edit(output: Path, changes: dict) -> None:
    """Changes the record of a folder or a PNG by hand."""
    record = read_record(output) | changes
    if output.is_dir():
        save_json(output / "settings.json", record)
    else:
        with Image.open(output) as image:
            save_png(output, image.copy(), record)


@pytest.mark.parametrize("name, file", [("x", "x/settings.json"), ("x.png", "x.png")])
def test_a_record_that_was_changed_is_one_sentence_and_nothing_is_lost(here, capsys, name, file):
    assert main(["stream", *SHORT, "-o", name]) == 0
    capsys.readouterr()
    record = read_record(here / name)
    for changes in SPOILT:
        edit(here / name, record | changes)
        before = files(here)
        error = refused(capsys, *SHORT, "-o", name)
        assert f"{file} is damaged or was changed" in error and f"{name}: name another output, or delete it" in error
        assert files(here) == before
    edit(here / name, record | {"stream": {"written": 32, "length": 64}})
    before = files(here)
    error = refused(capsys, *SHORT, "-o", name)
    assert "state.safetensors is gone, and is needed" in error and f"{name}, which records 32 of 64 pixels" in error
    assert files(here) == before
    edit(here / name, record)
    assert main(["stream", *SHORT, "-o", name]) == 0 and "finished before" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["x", "x.png"])
def test_a_state_that_was_changed_is_one_sentence_and_nothing_is_lost(here, capsys, monkeypatch, name):
    from safetensors import safe_open
    from safetensors.torch import save_file

    assert main(["stream", *LONG, "-o", f"whole{name}"]) == 0
    real = growing.Output.add

    def stop(self, *strip):
        real(self, *strip)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(growing.Output, "add", stop)
        assert main(["stream", *LONG, "-o", name]) == 130
    (state,) = here.glob("x*/state.safetensors")
    with safe_open(state, "pt") as file:
        tensors, metadata = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118
    kept = json.loads(metadata[KEY])
    assert 0 < kept["stream"]["written"] < 256
    capsys.readouterr()
    records = [kept | changes for changes in (*SPOILT, {"stream": {"written": 256, "length": 256}})]
    changed = [(tensors, metadata | {KEY: json.dumps(record)}) for record in [*records, [], 5, None]]
    changed += [(tensors, None), (tensors, {"other": "1"}), (tensors, metadata | {KEY: "[" * 100_000})]
    changed += [({k: v for k, v in tensors.items() if k != gone}, metadata) for gone in tensors]
    changed += [
        (tensors | {"number": torch.tensor([1, 2])}, metadata),
        (tensors | {"written": torch.tensor(16)}, metadata),
    ]
    whole = state.read_bytes()
    for content in changed:
        save_file(content[0], state, content[1])
        before, words = files(here), f"{state.relative_to(here)} cannot be read, or was changed, and is needed to go on"
        assert words in refused(capsys, *LONG, "-o", name)
        assert files(here) == before
    state.unlink()
    state.mkdir()
    assert words in refused(capsys, *LONG, "-o", name)
    state.rmdir()
    state.write_bytes(whole)
    record = read_record(here / name)
    edit(here / name, record | {"stream": {"written": 256, "length": 256}})
    assert "is damaged or was changed" in refused(capsys, *LONG, "-o", name) and state.read_bytes() == whole
    edit(here / name, record)
    assert main(["stream", *LONG, "-o", name]) == 0
    assert {file.removeprefix("whole"): content for file, content in files(here).items() if "whole" in file} == {
        file: content for file, content in files(here).items() if "whole" not in file
    }


def test_other_settings_are_told_in_words_of_the_options(here, capsys):
    (here / "p.txt").write_text("a blue boat\na green tree\n")
    other = ("--prompts", "p.txt", *SHORT[1:])
    for name, first, second, words in [
        ("one.png", SHORT, other, 'it was of the prompt "a red ball", and is now of --prompts'),
        ("two.png", other, SHORT, 'it was of --prompts, and is now of the prompt "a red ball"'),
        ("one.tif", SHORT, (*SHORT, "--pyramid"), 'pyramid was not said, and is now "yes"'),
        ("two.tif", (*SHORT, "--pyramid"), SHORT, 'pyramid was "yes", and is now not said'),
    ]:
        assert main(["stream", *first, "-o", name]) == 0
        capsys.readouterr()
        error = refused(capsys, *second, "-o", name)
        assert f"{name} holds a stream of other settings ({words}" in error and "null" not in error


@pytest.mark.parametrize("name", ["x", "x.png"])
def test_two_at_once_are_one_and_a_sentence(here, capsys, monkeypatch, name):
    pytest.importorskip("fcntl")
    real, errors = growing.Output.add, []

    def add(self, *strip):
        capsys.readouterr()
        before = files(here)
        errors.append(refused(capsys, *SHORT, "-o", name))
        assert files(here) == before
        real(self, *strip)

    monkeypatch.setattr(growing.Output, "add", add)
    assert main(["stream", *SHORT, "-o", name]) == 0
    assert errors and all(f"another process is at {name}: wait until it has ended" in error for error in errors)
    assert main(["stream", *SHORT, "-o", name]) == 0 and "finished before" in capsys.readouterr().err


def test_what_another_took_away_is_not_said_to_be_kept(here, capsys, monkeypatch):
    real = growing.Output.add

    def add(self, *strip):
        real(self, *strip)
        shutil.rmtree(self.home)
        raise FileNotFoundError(2, "No such file or directory")

    monkeypatch.setattr(growing.Output, "add", add)
    error = refused(capsys, *SHORT, "-o", "one.png", code=1)
    assert "0 of 64 pixels are kept, and the same command goes on" in error


# The command itself, ended.


def ended(process, folder: Path, sent: int, wait: float, seen: str = "one*") -> None:
    """Sends a signal some time after there is something of its output."""
    while process.is_alive() and not list(folder.glob(seen)):
        time.sleep(0.01)
    process.join(wait)
    if process.is_alive():
        os.kill(process.pid, sent)
    process.join()


@pytest.fixture(scope="module")
def ways(tmp_path_factory):
    """Of each kind of output: the words that make it, its files, and the seconds that it takes once it has begun."""
    found = {}
    for name in ("one.png", "one.tif", "one"):
        folder = tmp_path_factory.mktemp("whole")
        said = ["stream", *LONG, "-o", name, *(["--slice", "50"] if name == "one" else [])]
        process = start(said, folder)
        while process.is_alive() and not list(folder.glob("one*")):
            time.sleep(0.01)
        begun = time.perf_counter()
        process.join()
        assert process.exitcode == 0, (folder / "words.txt").read_text()
        found[name] = said, files(folder), time.perf_counter() - begun
    return found


def files(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file() and f.stem != "words"}


@pytest.mark.parametrize("number", range(KILLS))
def test_killed_at_a_random_moment_it_goes_on_to_the_identical_file(ways, tmp_path, number):
    said, expected, seconds = ways[("one.png", "one.tif", "one")[number % 3]]
    dice, kills = random.Random(number), 0
    for _ in range(3):
        process = start(said, tmp_path)
        ended(process, tmp_path, signal.SIGKILL, dice.uniform(0, seconds))
        kills += process.exitcode == -signal.SIGKILL
        if process.exitcode == 0:
            break
    process = start(said, tmp_path)
    process.join()
    assert process.exitcode == 0, (tmp_path / "words.txt").read_text()
    assert files(tmp_path) == expected
    print(f"{kills} kills", end=" ")


def test_ctrl_c_leaves_what_is_finished_and_the_same_command_goes_on(ways, tmp_path):
    said, expected, _ = ways["one.png"]
    process = start(said, tmp_path)
    ended(process, tmp_path, signal.SIGINT, 0, "one*/state*")
    assert process.exitcode == 130
    words = (tmp_path / "words.txt").read_text()
    assert "stopped: one.png holds" in words and "the same command goes on" in words
    part = pixels(tmp_path / "one.png")
    process = start(said, tmp_path)
    process.join()
    assert process.exitcode == 0 and files(tmp_path) == expected
    assert np.array_equal(part, pixels(tmp_path / "one.png")[:, : part.shape[1]]) and 0 < part.shape[1] < 256
