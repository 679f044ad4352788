"""Files: written whole or not at all, with the settings that made them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from PIL import Image, PngImagePlugin

KEY = "rolling-diffusion"  # the PNG text chunk that holds the settings, as JSON
ANIMATIONS = (".gif", ".webp", ".mp4")


def check_target(path: Path, suffixes: Sequence[str] = ()) -> None:
    """ValueError if `path` could not be written later: asked before any work is done."""
    if suffixes and path.suffix.lower() not in suffixes:
        raise ValueError(f"{path} must end in {' or '.join(suffixes)}")
    if path.is_dir():
        raise ValueError(f"{path} is a folder: name a file in it")
    if not path.parent.is_dir():
        raise ValueError(f"cannot write {path}: there is no folder {path.parent}")
    if path.exists() and not os.access(path, os.W_OK):
        raise ValueError(f"cannot write {path}: the file is read-only")
    try:
        _part(path).touch()
        _part(path).unlink()
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error.strerror}") from None


def _part(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.part")


@contextmanager
def whole(path: Path) -> Iterator[IO[bytes]]:
    """A binary file that takes its place at `path` when the block ends well, and leaves nothing behind otherwise."""
    part = _part(path)
    try:
        with open(part, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def save_json(path: Path, content: Any) -> None:
    with whole(path) as file:
        file.write((json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())


def save_png(path: Path, image: Image.Image, settings: dict[str, Any] | None = None) -> None:
    """A PNG; `settings` go into a text chunk that `read_settings` finds again."""
    info = PngImagePlugin.PngInfo()
    if settings is not None:
        info.add_itxt(KEY, json.dumps(settings, ensure_ascii=False))
    with whole(path) as file:
        image.save(file, format="PNG", pnginfo=info)


def read_settings(path: Path) -> dict[str, Any]:
    """The settings in a PNG that `generate` made; ValueError if there are none."""
    try:
        with Image.open(path) as image:
            text = getattr(image, "text", {}).get(KEY)
    except FileNotFoundError:
        raise ValueError(f"there is no file {path}") from None
    except OSError:
        raise ValueError(f"{path} is not a picture that can be read") from None
    settings = None
    if text is not None:
        try:
            settings = json.loads(text)
        except ValueError:
            settings = None
    if not isinstance(settings, dict):
        raise ValueError(f"{path} holds no settings of rolling-diffusion: only pictures made by generate do")
    return settings


def find_ffmpeg() -> str:
    """The ffmpeg program, from imageio-ffmpeg or the system; ValueError if there is none."""
    try:
        import imageio_ffmpeg  # pyright: ignore[reportMissingImports]

        return imageio_ffmpeg.get_ffmpeg_exe()
    except (ImportError, RuntimeError):
        found = shutil.which("ffmpeg")
    if found is None:
        raise ValueError("mp4 needs ffmpeg: run pip install imageio-ffmpeg, or choose a .gif or .webp animation")
    return found


def save_animation(path: Path, frames: Sequence[Image.Image], seconds: float = 4.0, hold: float = 1.5) -> None:
    """Frames of one size as GIF, WebP or MP4, by suffix: about `seconds` long, the last frame held for `hold` more."""
    each = min(0.2, max(0.04, seconds / len(frames)))
    kind = path.suffix.lower()
    if kind == ".mp4":
        _save_mp4(path, [*frames, *[frames[-1]] * round(hold / each)], 1 / each)
        return
    milliseconds = [round(1000 * each)] * (len(frames) - 1) + [round(1000 * hold)]
    options: dict[str, Any] = {"save_all": True, "duration": milliseconds, "loop": 0}
    if kind == ".webp":
        options |= {"quality": 85, "method": 4}
    if kind == ".gif":
        frames = [_dithered(frame) for frame in frames]
    with whole(path) as file:
        frames[0].save(file, format=kind[1:].upper(), append_images=list(frames[1:]), **options)


def _dithered(frame: Image.Image) -> Image.Image:
    """In 256 colours, small spots of colour among them, and without bands in soft gradients."""
    palette = frame.quantize(method=Image.Quantize.MAXCOVERAGE, kmeans=1)
    return frame.quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG)


def _save_mp4(path: Path, frames: Sequence[Image.Image], rate: float) -> None:
    width, height = frames[0].size
    part = _part(path)
    command = [find_ffmpeg(), "-y", "-loglevel", "error"]
    command += ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", f"{rate:g}", "-i", "-"]
    command += [
        "-c:v",
        "libx264",
        "-pix_fmt",
        "yuv420p",
        "-crf",
        "18",
        "-movflags",
        "+faststart",
        "-f",
        "mp4",
        str(part),
    ]
    try:
        raw = b"".join(frame.convert("RGB").tobytes() for frame in frames)
        done = subprocess.run(command, input=raw, capture_output=True)
        if done.returncode:
            raise ValueError(f"ffmpeg could not write {path}: {done.stderr.decode(errors='replace').strip()[-200:]}")
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
