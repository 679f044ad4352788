"""Files: written whole or not at all; what cannot be written where it was to be is kept elsewhere."""

from __future__ import annotations

import json
import os
import platform
import re
import tempfile
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any
from zlib import crc32

import psutil
from PIL import Image, PngImagePlugin, TiffImagePlugin

from ..recording import KEY, as_json, chunk, in_eight_bits

DESCRIPTION = 270  # the tag of a TIFF that holds what a PNG holds in a chunk
SETTINGS_FILE = "settings.json"  # the file in a folder of slices that holds it
PLACES = (tempfile.gettempdir, Path.home, Path.cwd)  # where a file is kept that cannot be written where it was to be
PNG_END = b"\0\0\0\0IEND\xaeB`\x82"
# A file that is being written names the machine and the process that write it: others may write to the folder, too.
HOST = f"{crc32(platform.node().encode()):08x}"
PART = re.compile(rf"\..+\.{HOST}\.(\d+)\.part")


class Unwritten(Exception):
    """A file that could not be written to its place: why, and where it is kept."""


def check_target(path: Path, suffixes: Sequence[str] = ()) -> None:
    """ValueError if `path` could not be written later: asked before any work is done."""
    if suffixes and path.suffix.lower() not in suffixes:
        raise ValueError(f"{path} must end in {' or '.join(suffixes)}")
    target = _through(path)
    try:
        if target.is_dir():
            raise ValueError(f"{path} is a folder: name a file in it")
        if not target.parent.is_dir():
            raise ValueError(f"cannot write {path}: there is no folder {target.parent}")
        if target.exists() and not target.is_file():
            raise ValueError(f"cannot write {path}: it is no regular file")
        if target.exists() and not os.access(target, os.W_OK):
            raise ValueError(f"cannot write {path}: the file is read-only")
        _sweep_once(target.parent)
        _part(target).touch()
        _part(target).unlink()
    except OSError as error:
        raise ValueError(f"cannot write {str(path)[:300]}: {error.strerror}") from None


def make_folder(path: Path) -> None:
    """Makes a folder, and those above it; ValueError if it cannot be."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"cannot write to {path}: {error.strerror}") from None


def check_apart(targets: Mapping[str, Path | None]) -> None:
    """ValueError if two of the named targets are one file."""
    seen: dict[Path, str] = {}
    for name, path in targets.items():
        if path is None:
            continue
        target = Path(os.path.normcase(_through(path)))
        if target in seen:
            raise ValueError(f"{seen[target]} and {name} both name {path}: give each a file of its own")
        seen[target] = name


def free(path: Path) -> Path:
    """`path`, or with -2, -3 and so on after its name, the first that is no file yet."""
    return next(p for p in _alternatives(path) if not os.path.lexists(p))


def put(path: Path, write: Callable[[Path], object], fresh: bool = False) -> Path:
    """Has `write` fill a file, which then takes its place at `path`, whole; returns the place.

    fresh: where there is a file by then, the next free name is taken, instead of replacing it. Unwritten, where the
    place cannot be written to any more, says where the file is kept instead.
    """
    try:
        return place(path, write, fresh)
    except OSError as error:
        why = f"cannot write {path}: {_reason(error)}"
    for folder in PLACES:
        try:
            kept = place(Path(folder()) / path.name, write, fresh=True)
        except (OSError, RuntimeError):  # RuntimeError: no home
            continue
        raise Unwritten(f"{why}; it is kept at {kept}")
    raise Unwritten(f"{why}; and there is no other place to keep it")


def place(path: Path, write: Callable[[Path], object], fresh: bool = False) -> Path:
    """What `put` does, or OSError."""
    target = path if fresh else _through(path)
    part = _part(target)
    try:
        write(part)
        with open(part, "rb+") as file:
            os.fsync(file.fileno())
        if fresh:
            path = target = _claim(path)
        os.replace(part, target)
    finally:
        with suppress(OSError):
            part.unlink()
    return path


def _claim(path: Path) -> Path:
    """Makes an empty file of the first free name, so that no other run takes it."""
    for name in _alternatives(path):
        with suppress(FileExistsError):
            os.close(os.open(name, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
            return name
    raise AssertionError("unreachable")


def _alternatives(path: Path):
    yield path
    for number in count(2):
        yield path.with_name(f"{path.stem}-{number}{path.suffix}")


def _through(path: Path) -> Path:
    """What `path` leads to: links stay links, and the files that they name are written."""
    return Path(os.path.realpath(path))


def _part(path: Path) -> Path:
    return path.with_name(f".{path.name}.{HOST}.{os.getpid()}.part")


def sweep(folder: Path) -> None:
    """Removes what processes of this machine that were killed while writing have left in a folder."""
    with suppress(OSError):  # a folder may be written to, but not listed
        for name in os.listdir(folder):
            found = PART.fullmatch(name)
            if found and not psutil.pid_exists(int(found[1])):
                (folder / name).unlink()


_sweep_once = cache(sweep)  # a run does not wait for itself


def _reason(error: OSError) -> str:
    return error.strerror or str(error).partition("\n")[0] or type(error).__name__


def save_json(path: Path, content: Any) -> Path:
    return put(path, lambda part: part.write_bytes(as_json(content, indent=2) + b"\n"))


def save_json_lines(path: Path, rows: Iterable[Any]) -> Path:
    return put(path, lambda part: part.write_bytes(b"".join(as_json(row) + b"\n" for row in rows)))


def save_png(path: Path, image: Image.Image, record: dict[str, Any] | None = None, fresh: bool = False) -> Path:
    """A PNG; `record` goes into a text chunk that `read_record` finds again."""
    return put(path, lambda part: write_image(part, image, record), fresh)


def write_image(path: Path, image: Image.Image, record: dict[str, Any] | None) -> None:
    image.save(path, format="PNG", pnginfo=chunk(record))


def read_record(path: Path) -> dict[str, Any]:
    """What was recorded in a PNG, in a TIFF, or in a folder of slices; ValueError if there is nothing. The picture may
    be of any size."""
    path = path / SETTINGS_FILE if Path(path).is_dir() else path
    kind = Path(path).suffix.lower()
    what = {".tif": "TIFF picture", ".tiff": "TIFF picture", ".json": "file of settings"}.get(kind, "PNG picture")
    try:
        with open(path, "rb") as file:
            # Not Image.open: it refuses large pictures, and only what stands before the pixels is wanted.
            if what == "TIFF picture":
                text = TiffImagePlugin.TiffImageFile(file).tag_v2.get(DESCRIPTION)
            elif kind == ".json":
                text = file.read().decode()
            else:
                text = PngImagePlugin.PngImageFile(file).info.get(KEY)
    except FileNotFoundError:
        raise ValueError(f"there is no file {path}") from None
    except Exception:  # whatever a damaged file makes of the reader
        raise ValueError(f"{path} is not a {what} that can be read") from None
    try:
        record = json.loads(text) if isinstance(text, str) else None
    except (ValueError, RecursionError):
        record = None
    if not isinstance(record, dict):
        raise ValueError(f"{path} holds no settings of rolling-diffusion: only pictures made by it do")
    return record


def is_whole_png(path: Path) -> bool:
    """True for a PNG that has its end, too."""
    try:
        with open(path, "rb") as file:
            file.seek(-len(PNG_END), os.SEEK_END)
            return file.read() == PNG_END
    except OSError:
        return False


def read_picture(path: Path, option: str, mode: str) -> Image.Image:
    """A picture of the user's, upright; ValueError if it is none."""
    from PIL import ImageOps

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # twice as many pixels are an error
            with Image.open(path) as image:
                picture = ImageOps.exif_transpose(image)
    except FileNotFoundError:
        raise ValueError(f"{option} {path}: there is no such file") from None
    except Image.DecompressionBombError:
        raise ValueError(f"{option} {path} has too many pixels: take a smaller picture") from None
    except Exception:
        raise ValueError(f"{option} {path} is not a picture that can be read") from None
    try:
        picture = in_eight_bits(picture)
    except ValueError as error:
        raise ValueError(f"{option} {path} {error}") from None
    clear = mode == "RGB" and picture.has_transparency_data
    if clear and picture.convert("RGBA").getchannel("A").getextrema() != (255, 255):
        raise ValueError(
            f"{option} {path} has transparent parts, and what is drawn has none: lay it on a background first"
        )
    return picture.convert(mode)
