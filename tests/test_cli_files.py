"""Files are whole or absent, targets are checked first, settings survive a PNG."""

import os
import stat

import numpy as np
import pytest
from PIL import Image, ImageFilter, ImageSequence

from rolling_diffusion.cli import files

FRAMES = [Image.new("RGB", (64, 32), (i * 20, 80, 200 - i * 10)) for i in range(10)]


def test_settings_come_back_from_a_png(tmp_path):
    file = tmp_path / "picture.png"
    settings = {"prompt": "ein Häuschen, 雪", "seed": 7, "cfg": 3.5, "lookahead": None}
    files.save_png(file, FRAMES[0], settings)
    assert files.read_settings(file) == settings


def test_a_failed_write_leaves_the_old_file_and_no_trace(tmp_path):
    file = tmp_path / "picture.png"
    file.write_bytes(b"old")
    with pytest.raises(RuntimeError), files.whole(file) as out:
        out.write(b"half of the n")
        raise RuntimeError
    assert file.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [file]


def test_a_new_file_has_the_usual_permissions(tmp_path):
    files.save_json(tmp_path / "report.json", {})
    usual = tmp_path / "usual"
    usual.touch()
    assert stat.S_IMODE((tmp_path / "report.json").stat().st_mode) == stat.S_IMODE(usual.stat().st_mode)


@pytest.mark.parametrize("make", ["folder", "missing", "under a file", "suffix"])
def test_an_unwritable_target_is_found_before(tmp_path, make):
    (tmp_path / "file").touch()
    (tmp_path / "folder.png").mkdir()
    path = {"folder": "folder.png", "missing": "no/x.png", "under a file": "file/x.png", "suffix": "x.jpg"}[make]
    with pytest.raises(ValueError) as caught:
        files.check_target(tmp_path / path, (".png",))
    assert path in str(caught.value)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_target_is_found_before(tmp_path):
    file = tmp_path / "x.png"
    file.touch(0o400)
    with pytest.raises(ValueError, match="read-only"):
        files.check_target(file)


def test_checking_a_target_changes_nothing(tmp_path):
    file = tmp_path / "x.png"
    files.check_target(file, (".png",))
    assert list(tmp_path.iterdir()) == []
    file.write_bytes(b"old")
    files.check_target(file, (".png",))
    assert file.read_bytes() == b"old"


@pytest.mark.parametrize("suffix", [".gif", ".webp"])
def test_an_animation_plays_every_frame_and_holds_the_last(tmp_path, suffix):
    file = tmp_path / f"growing{suffix}"
    files.save_animation(file, FRAMES)
    with Image.open(file) as image:
        durations = []
        for frame in ImageSequence.Iterator(image):
            frame.load()
            durations.append(frame.info["duration"])
    assert len(durations) == len(FRAMES)
    assert durations[-1] == 1500 and durations[0] == 200


def test_a_gif_keeps_small_spots_of_colour_and_shows_soft_gradients_without_bands(tmp_path):
    y, x = np.mgrid[0:256, 0:256] / 255
    picture = np.stack([120 + 70 * y + 40 * x, 190 + 50 * y - 60 * x, 240 - 90 * y], -1).round().astype(np.uint8)
    picture[100:106, 100:106] = (90, 30, 110)
    frames = [Image.fromarray(picture), Image.fromarray(picture[::-1].copy())]
    files.save_animation(tmp_path / "one.gif", frames)
    with Image.open(tmp_path / "one.gif") as image:
        shown = [frame.convert("RGB") for frame in ImageSequence.Iterator(image)]

    def apart(one: Image.Image, two: Image.Image) -> int:
        return np.abs(np.asarray(one).astype(int) - np.asarray(two)).max()

    for frame, seen in zip(frames, shown):
        blurred = [image.filter(ImageFilter.GaussianBlur(3)) for image in (frame, seen)]
        assert apart(frame, seen) < 20 and apart(*blurred) < 6  # GIF's usual 256 colours: 111 and 49


def test_mp4_without_ffmpeg_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "imageio_ffmpeg", None)
    monkeypatch.setattr(files.shutil, "which", lambda name: None)
    with pytest.raises(ValueError, match=r"mp4 needs ffmpeg: .*\.gif or \.webp"):
        files.find_ffmpeg()


def test_mp4_is_written_where_ffmpeg_is(tmp_path):
    try:
        files.find_ffmpeg()
    except ValueError:
        pytest.skip("no ffmpeg here")
    file = tmp_path / "growing.mp4"
    files.save_animation(file, FRAMES)
    assert file.read_bytes()[4:8] == b"ftyp"
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize(
    "content, words", [(None, "there is no file"), (b"x", "not a picture"), ("png", "no settings")]
)
def test_a_picture_without_settings_is_one_sentence(tmp_path, content, words):
    file = tmp_path / "x.png"
    if content == "png":
        FRAMES[0].save(file)
    elif content is not None:
        file.write_bytes(content)
    with pytest.raises(ValueError, match=words):
        files.read_settings(file)
