"""Files are whole or absent, targets are checked first, settings survive a PNG."""

import errno
import os
import stat
import subprocess
import sys
import zlib

import numpy as np
import pytest
from PIL import Image, ImageFilter, ImageSequence, PngImagePlugin

from rolling_diffusion.cli import files
from rolling_diffusion.cli.animation import check_mp4, save_animation
from rolling_diffusion.serve.pictures import opened

FRAMES = [Image.new("RGB", (64, 32), (i * 20, 80, 200 - i * 10)) for i in range(10)]


def test_settings_come_back_from_a_png(tmp_path):
    file = tmp_path / "picture.png"
    settings = {"prompt": "ein Häuschen, 雪", "seed": 7, "cfg": 3.5, "lookahead": None}
    files.save_png(file, FRAMES[0], settings)
    assert files.read_record(file) == settings


def test_a_failed_write_leaves_the_old_file_and_no_trace(tmp_path):
    file = tmp_path / "picture.png"
    file.write_bytes(b"old")

    def fail(part):
        part.write_bytes(b"half of the n")
        raise RuntimeError

    with pytest.raises(RuntimeError):
        files.put(file, fail)
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
    save_animation(file, FRAMES)
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
    save_animation(tmp_path / "one.gif", frames)
    with Image.open(tmp_path / "one.gif") as image:
        shown = [frame.convert("RGB") for frame in ImageSequence.Iterator(image)]

    def apart(one: Image.Image, two: Image.Image) -> int:
        return np.abs(np.asarray(one).astype(int) - np.asarray(two)).max()

    for frame, seen in zip(frames, shown):
        blurred = [image.filter(ImageFilter.GaussianBlur(3)) for image in (frame, seen)]
        assert apart(frame, seen) < 20 and apart(*blurred) < 6  # GIF's usual 256 colours: 111 and 49


def test_mp4_without_ffmpeg_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "imageio_ffmpeg", None)
    with pytest.raises(ValueError, match=r"mp4 needs ffmpeg: .*\.gif or \.webp"):
        check_mp4()


def test_mp4_is_written_whole_where_ffmpeg_is(tmp_path):
    ffmpeg = pytest.importorskip("imageio_ffmpeg")
    file = tmp_path / "growing.mp4"
    save_animation(file, FRAMES)
    assert file.read_bytes()[4:8] == b"ftyp"
    assert ffmpeg.count_frames_and_secs(str(file))[0] == len(FRAMES) + 8  # at 0.2 s each, the last held for 1.5
    assert list(tmp_path.iterdir()) == [file]


def test_an_mp4_that_ffmpeg_cannot_finish_is_kept_nowhere_as_if_it_were_whole(tmp_path, monkeypatch):
    ffmpeg = pytest.importorskip("imageio_ffmpeg")
    monkeypatch.setattr(ffmpeg, "count_frames_and_secs", lambda path: (3, 0.6))
    monkeypatch.setattr(files, "PLACES", ())
    with pytest.raises(files.Unwritten, match="ffmpeg could not finish the file; and there is no other place"):
        save_animation(tmp_path / "growing.mp4", FRAMES)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "content, words", [(None, "there is no file"), (b"x", "not a PNG picture"), ("png", "no settings")]
)
def test_a_picture_without_settings_is_one_sentence(tmp_path, content, words):
    file = tmp_path / "x.png"
    if content == "png":
        FRAMES[0].save(file)
    elif content is not None:
        file.write_bytes(content)
    with pytest.raises(ValueError, match=words):
        files.read_record(file)


def test_a_name_that_was_not_given_never_overwrites(tmp_path):
    file = tmp_path / "ball.png"
    file.write_bytes(b"mine")
    (tmp_path / "ball-2.png").symlink_to("nowhere.png")
    assert files.free(file) == tmp_path / "ball-3.png"
    # A file that appears between the choice of the name and the writing is left alone too.
    (tmp_path / "ball-3.png").write_bytes(b"another run's")
    placed = files.save_png(tmp_path / "ball-3.png", FRAMES[0], fresh=True)
    assert placed == tmp_path / "ball-3-2.png" and Image.open(placed).size == FRAMES[0].size
    assert file.read_bytes() == b"mine" and (tmp_path / "ball-3.png").read_bytes() == b"another run's"


@pytest.fixture()
def elsewhere(tmp_path, monkeypatch):
    """The folder for temporary files."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    monkeypatch.setattr(files.tempfile, "tempdir", str(folder))
    return folder


def test_a_picture_is_kept_elsewhere_where_its_folder_is_gone(tmp_path, elsewhere):
    (elsewhere / "p.png").write_bytes(b"of another")
    with pytest.raises(files.Unwritten) as caught:
        files.save_png(tmp_path / "gone" / "p.png", FRAMES[0], {"seed": 7})
    kept = elsewhere / "p-2.png"
    assert str(caught.value) == (
        f"cannot write {tmp_path / 'gone' / 'p.png'}: No such file or directory; it is kept at {kept}"
    )
    assert files.read_record(kept) == {"seed": 7}
    assert len(list(elsewhere.iterdir())) == 2


@pytest.mark.parametrize("suffix", [".png", ".gif", ".webp", ".json"])
def test_a_full_disk_is_one_sentence_and_leaves_no_trace_on_it(tmp_path, elsewhere, monkeypatch, suffix):
    file = tmp_path / f"p{suffix}"
    file.write_bytes(b"old")
    real = os.fsync

    def full(number):
        if os.readlink(f"/proc/self/fd/{number}").startswith(str(elsewhere)):
            return real(number)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(files.Unwritten, match=rf"No space left on device; it is kept at {elsewhere}/p\{suffix}"):
        if suffix == ".png":
            files.save_png(file, FRAMES[0])
        elif suffix == ".json":
            files.save_json(file, {})
        else:
            save_animation(file, FRAMES)
    assert file.read_bytes() == b"old" and sorted(tmp_path.iterdir()) == [elsewhere, file]


def test_what_is_no_regular_file_is_refused_and_links_are_written_through(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "to-pipe.png").symlink_to("pipe.png")
    for name in ("pipe.png", "to-pipe.png"):
        with pytest.raises(ValueError, match="is no regular file"):
            files.check_target(tmp_path / name)
    (tmp_path / "real").mkdir()
    link = tmp_path / "link.png"
    link.symlink_to("real/p.png")
    files.check_target(link, (".png",))
    assert files.save_png(link, FRAMES[0]) == link
    assert link.is_symlink() and (tmp_path / "real" / "p.png").is_file()


def test_one_file_for_two_things_is_refused(tmp_path):
    (tmp_path / "link.json").symlink_to("p.json")
    for other in ("p.json", "link.json", "../" + tmp_path.name + "/p.json"):
        with pytest.raises(ValueError, match="--output and --report both name"):
            files.check_apart({"--output": tmp_path / "p.json", "--animation": None, "--report": tmp_path / other})
    files.check_apart({"--output": tmp_path / "p.json", "--report": tmp_path / "q.json"})


def test_what_a_killed_run_left_half_written_is_removed_by_the_next_one(tmp_path):
    killed = subprocess.Popen([sys.executable, "-c", ""])
    killed.wait()
    (tmp_path / f".p.png.{files.HOST}.{killed.pid}.part").touch()
    mine, others = tmp_path / f".q.png.{files.HOST}.{os.getppid()}.part", tmp_path / ".p.part"
    elsewhere = tmp_path / f".p.png.0123abcd.{killed.pid}.part"  # another machine's, which may be at it
    for file in (mine, others, elsewhere):
        file.touch()
    files.check_target(tmp_path / "new.png")
    assert sorted(tmp_path.iterdir()) == sorted([mine, others, elsewhere])


def test_a_record_is_read_from_a_picture_of_any_size(tmp_path, monkeypatch):
    file = tmp_path / "huge.png"
    files.save_png(file, Image.new("1", (300, 300)), {"said": {}})
    raw = bytearray(file.read_bytes())
    raw[16:24] = (30_000).to_bytes(4, "big") * 2  # 900 megapixels, as the header has it
    raw[29:33] = zlib.crc32(raw[12:29]).to_bytes(4, "big")
    file.write_bytes(raw)
    assert files.read_record(file) == {"said": {}}
    with pytest.raises(ValueError, match=r"--image .*huge\.png has too many pixels"):
        files.read_picture(file, "--image", "RGB")


@pytest.mark.parametrize("chunk", ["7", "[]", "{", "[" * 100_000], ids=["number", "list", "broken", "deep"])
def test_a_record_that_is_none_is_one_sentence(tmp_path, chunk):
    info = PngImagePlugin.PngInfo()
    info.add_itxt(files.KEY, chunk)
    Image.new("L", (8, 8)).save(tmp_path / "p.png", pnginfo=info)
    with pytest.raises(ValueError, match="holds no settings"):
        files.read_record(tmp_path / "p.png")


def test_a_picture_of_sixteen_bits_keeps_its_tones(tmp_path):
    tones = np.linspace(0, 65535, 64 * 64).reshape(64, 64)
    for kind, name in (("uint16", "deep.png"), ("int32", "deep.tif")):
        Image.fromarray(tones.round().astype(kind)).save(tmp_path / name)
        for mode in ("RGB", "L"):
            seen = np.asarray(files.read_picture(tmp_path / name, "--image", mode), float)
            assert np.abs(seen.reshape(64, 64, -1) - tones[..., None] / 257).max() <= 0.51
    assert opened((tmp_path / "deep.png").read_bytes(), "image").getpixel((32, 32)) == (130, 130, 130)
    for kind, most in (("int32", 2**31 - 1), ("float32", 1.0)):
        Image.fromarray((tones / 65535 * most).astype(kind)).save(tmp_path / "deeper.tif")
        with pytest.raises(ValueError, match=r"deeper\.tif has pixels of 32 bits: save it with 8 or 16"):
            files.read_picture(tmp_path / "deeper.tif", "--image", "RGB")
