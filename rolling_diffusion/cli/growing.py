"""Outputs that grow: finished pixels on disk, the state to go on from, and pictures that are made of them row by row.

What is held in memory does not grow with the canvas. Pixels are on the disk before the state that counts them: what was
killed in between is drawn once more, the same, and written to the same place.
"""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from ..recording import KEY
from .files import SETTINGS_FILE, check_target, place, read_record, sweep, write_image

if TYPE_CHECKING:
    from torch import Tensor

PICTURES = (".png", ".tif", ".tiff")
BAND = 2**19  # bytes of rows that are read at a time
TILE = 256  # pixels of a side of a TIFF's tiles
CHUNK = 2**16  # bytes of a PNG's chunk of pixels
MOST_PNG = 2**31 - 1  # pixels of a side
SUM = "crc32"  # of a state, in its metadata
MOST_SHOWN = 40  # letters of a setting, in a sentence


class Canvas:
    """Pixels (height, width, 3) in a file: written anywhere, read by rows, never held. Nor are they mapped into memory:
    there a full disk would end the program."""

    def __init__(self, path: Path, height: int, width: int):
        self.height, self.width = height, width
        self.file = open(path, "r+b" if path.exists() else "w+b")  # noqa: SIM115 (as long as the canvas)
        self.file.truncate(3 * height * width)

    def write(self, top: int, left: int, pixels: np.ndarray) -> None:
        """pixels: (h, w, 3), uint8."""
        rows = [pixels] if pixels.shape[1] == self.width else pixels
        for number, row in enumerate(rows, top):
            self.file.seek(3 * (number * self.width + left))
            self.file.write(row.tobytes())

    def read(self, top: int, left: int, height: int, width: int) -> np.ndarray:
        """(height, width, 3), of as much of it as lies on the canvas."""
        height, width = min(height, self.height - top), min(width, self.width - left)
        if width == self.width:
            self.file.seek(3 * top * width)
            return np.frombuffer(self.file.read(3 * height * width), np.uint8).reshape(height, width, 3)
        found = np.empty((height, width, 3), np.uint8)
        for row in range(height):
            self.file.seek(3 * ((top + row) * self.width + left))
            found[row] = np.frombuffer(self.file.read(3 * width), np.uint8).reshape(width, 3)
        return found

    def sync(self) -> None:
        self.file.flush()
        os.fsync(self.file.fileno())

    def close(self) -> None:
        with suppress(OSError):  # of pixels that a full disk did not take: said before
            self.file.close()

    def __enter__(self) -> Canvas:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


Box = tuple[int, int, int, int]  # top, left, height, width


def write_png(path: Path, canvas: Canvas, box: Box, record: Mapping[str, Any]) -> None:
    """A part of a canvas as a PNG, a few rows at a time, with a record that `read_record` finds."""
    top, left, height, width = box
    text = json.dumps(record, ensure_ascii=True).encode()
    with open(path, "wb") as file:
        file.write(b"\x89PNG\r\n\x1a\n")
        _chunk(file, b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
        _chunk(file, b"iTXt", KEY.encode() + b"\0" * 5 + text)
        packer, waiting = zlib.compressobj(6, zlib.DEFLATED, 15, 9, zlib.Z_FILTERED), b""
        above = np.zeros((1, 3 * width), np.uint8)
        each = max(1, BAND // (3 * width))
        for start in range(0, height, each):
            rows = canvas.read(top + start, left, min(each, height - start), width).reshape(-1, 3 * width)
            waiting += packer.compress(_filtered(rows, above).tobytes())
            above = rows[-1:]
            if len(waiting) >= CHUNK:
                _chunk(file, b"IDAT", waiting)
                waiting = b""
        _chunk(file, b"IDAT", waiting + packer.flush())
        _chunk(file, b"IEND", b"")


def _chunk(file: BinaryIO, kind: bytes, data: bytes) -> None:
    file.write(struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)))


def _filtered(rows: np.ndarray, above: np.ndarray) -> np.ndarray:
    """Rows (n, bytes) as a PNG holds them: each as differences from its left, its upper, or the nearest of three
    neighbours, whichever are smallest, after the number of that filter."""
    up = np.concatenate([above, rows[:-1]])
    left, corner = (np.pad(x[:, :-3], ((0, 0), (3, 0))) for x in (rows, up))
    found, least = np.empty((len(rows), rows.shape[1] + 1), np.uint8), None
    for number, guess in ((1, left), (2, up), (4, None)):
        missed = rows - (_nearest(left, up, corner) if guess is None else guess)
        size = np.minimum(missed, 0 - missed).sum(1, dtype=np.int64)
        better = np.ones(len(rows), bool) if least is None else size < least
        least = size if least is None else np.minimum(size, least)
        found[better, 0], found[better, 1:] = number, missed[better]
    return found


def _nearest(left: np.ndarray, up: np.ndarray, corner: np.ndarray) -> np.ndarray:
    """Of three neighbours, the one nearest to left + up - corner (Paeth), some columns at a time: it takes room."""
    found = np.empty_like(left)
    each = max(1, BAND // (8 * len(left)))
    for start in range(0, left.shape[1], each):
        part = slice(start, start + each)
        a, b, c = (x[:, part].astype(np.int16) for x in (left, up, corner))
        far_a, far_b, far_c = abs(b - c), abs(a - c), abs(a + b - 2 * c)
        nearer = np.where(far_b <= far_c, up[:, part], corner[:, part])
        found[:, part] = np.where((far_a <= far_b) & (far_a <= far_c), left[:, part], nearer)
    return found


def write_tiff(path: Path, canvas: Canvas, box: Box, record: Mapping[str, Any], pyramid: bool) -> None:
    """A part of a canvas as a BigTIFF of tiles; pyramid: followed by the same at a half, a quarter and so on."""
    tifffile = tiff_library()
    common: dict[str, Any] = {"dtype": np.uint8, "tile": (TILE, TILE), "photometric": "rgb", "metadata": None}
    common |= {"compression": "zlib", "predictor": True, "software": False, "maxworkers": 1}
    levels, sizes = [(canvas, box)], []
    height, width = box[2:]
    while pyramid and max(height, width) > TILE and min(height, width) > 1:
        height, width = -(-height // 2), -(-width // 2)
        sizes.append((height, width))
    try:
        for number, (height, width) in enumerate(sizes):
            smaller = Canvas(Path(canvas.file.name).with_name(f"level-{number}.raw"), height, width)
            levels.append((smaller, (0, 0, height, width)))
            _halve(*levels[-2], smaller)
        with tifffile.TiffWriter(path, bigtiff=True) as file:
            for number, (level, part) in enumerate(levels):
                # The tag of text holds ASCII alone.
                more = {"subfiletype": 1} if number else {"description": json.dumps(record), "subifds": len(sizes)}
                file.write(_tiles(level, part), shape=(*part[2:], 3), **common, **more)
    finally:
        for level, _ in levels[1:]:
            level.close()
            Path(level.file.name).unlink()


def _halve(canvas: Canvas, box: Box, smaller: Canvas) -> None:
    """Means of 2×2 pixels; at an odd edge, of those that there are."""
    top, left, height, width = box
    each = max(1, BAND // (6 * width))
    for row in range(0, smaller.height, each):
        count = min(2 * each, height - 2 * row)
        rows = canvas.read(top + 2 * row, left, count, width)
        rows = np.pad(rows, ((0, count % 2), (0, width % 2), (0, 0)), "edge").astype(np.uint16)
        means = (rows[::2, ::2] + rows[1::2, ::2] + rows[::2, 1::2] + rows[1::2, 1::2] + 2) // 4
        smaller.write(row, 0, means.astype(np.uint8))
    smaller.file.flush()


def _tiles(canvas: Canvas, box: Box) -> Iterator[np.ndarray]:
    top, left, height, width = box
    for row in range(0, height, TILE):
        for column in range(0, width, TILE):
            high, wide = min(TILE, height - row), min(TILE, width - column)
            tile = np.zeros((TILE, TILE, 3), np.uint8)
            tile[:high, :wide] = canvas.read(top + row, left + column, high, wide)
            yield tile


def tiff_library() -> Any:
    """tifffile; ValueError where it is not installed."""
    try:
        import tifffile
    except ImportError:
        raise ValueError(
            "a .tif needs tifffile: pip install 'autoregressive-rolling-diffusion[stream]', or take a .png or a folder"
        ) from None
    return tifffile


class Output:
    """The file or folder that a stream is written to, and how far it is; see `open_output`."""

    def __init__(self, path: Path, home: Path, axis: int, backwards: bool):
        self.path, self.home, self.axis, self.backwards = path, home, axis, backwards
        self.state = home / "state.safetensors"
        self.record: dict[str, Any] = {}
        self.across = self.length = self.written = 0
        self.opened = ExitStack()

    def check(self) -> None:
        """ValueError if something stands there that is no stream, or if another process is at it."""
        sweep(self.home)
        self.there()
        self.hold()
        self.close()  # held from `open` on

    def there(self) -> dict[str, Any] | None:
        """What is recorded at its place, None where nothing stands there; ValueError if that is no stream's record."""
        if not self.taken():
            return None
        try:
            record = read_record(self.path)
        except ValueError:
            record = {}
        if not isinstance(record.get("stream"), dict):
            raise ValueError(f"{self.path} is there already, and is no stream of rolling-diffusion: {ELSE}")
        if not _is_told(record):
            raise self.spoilt()
        return record

    def spoilt(self) -> ValueError:
        file = self.path / SETTINGS_FILE if self.path.is_dir() else self.path
        why = "is damaged or was changed, and does not tell how to go on with"
        return ValueError(f"{file} {why} {self.path}: {ELSE}")

    def hold(self) -> None:
        """ValueError where another process is at it: two would write the same pixels, and the first that is done takes
        them away. The system frees what is held when a process ends, however it does."""
        if not self.home.is_dir():
            return
        try:
            import fcntl

            folder = os.open(self.home, os.O_RDONLY)
            self.opened.callback(os.close, folder)
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.close()
            raise ValueError(
                f"another process is at {self.path}: wait until it has ended, or name another output"
            ) from None
        except (ImportError, OSError):  # Windows, or a disk that holds nothing
            pass

    def taken(self) -> bool:
        """Is there something at its place?"""
        return os.path.lexists(self.path) and not (self.path.is_dir() and not any(self.path.iterdir()))

    def begin(self, record: dict[str, Any], across: int, length: int) -> tuple[dict[str, Tensor] | None, bool]:
        """The state to go on from, and whether all is finished; makes what pixels are written to. record: of the
        settings.

        ValueError for an output of other settings, or where there is no room."""
        self.record, self.across, self.length = record, across, length
        there = self.there()
        state: dict[str, Tensor] | None = None
        if self.state.exists():
            from safetensors import safe_open

            try:
                with safe_open(self.state, "pt") as file:
                    text = file.metadata()[KEY]
                    state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
                    whole = file.metadata()[SUM] == _sum(text, state)
                kept = json.loads(text)
            except Exception:  # whatever a damaged file makes of the reader
                whole, kept = False, {}
            if not whole or not _is_told(kept):
                raise ValueError(
                    f"{self.state} cannot be read, or was changed, and is needed to go on with {self.path}: {ELSE}"
                )
            self.same(kept, self.home)
            self.written = kept["stream"]["written"]
        if there is not None:
            self.same(there, self.path)
            shown = there["stream"]["written"]
            if there["stream"]["length"] != length or (state is not None and shown > self.written):
                raise self.spoilt()
            if shown == length:  # whole, in its place
                self.clear()
                return None, True
            if shown and state is None:
                raise ValueError(
                    f"{self.state} is gone, and is needed to go on with {self.path}, which records {shown:,} of "
                    f"{length:,} pixels: {ELSE}"
                )
        self.open(state)
        return state, False

    def same(self, there: Mapping[str, Any], where: Path) -> None:
        """ValueError unless it records the same settings; those of the machine may be others, but for the dtype."""
        old, new = ({**r["said"], **r["fitted"], **r["machine"]} for r in (there, self.record))
        now = json.loads(json.dumps(new))
        names = [n for n in {**old, **now} if n not in ("device", "cpu_offload") and old.get(n) != now.get(n)]
        shown = [f"{n} was {_short(old.get(n))}, and is now {_short(now.get(n))}" for n in names]
        if bool(old.get("prompts")) != bool(now.get("prompts")):
            others = [text for n, text in zip(names, shown) if n not in ("prompt", "prompts")]
            shown = [f"it was of {_source(old)}, and is now of {_source(now)}", *others]
        if shown:
            raise ValueError(f"{where} holds a stream of other settings ({'; '.join(shown[:2])}): say the same, {ELSE}")

    def told(self, written: int) -> dict[str, Any]:
        return self.record | {"stream": {"written": written, "length": self.length}}

    def room(self, needed: int) -> None:
        """ValueError unless the disk takes so many bytes."""
        import shutil

        free = shutil.disk_usage(self.home).free
        if needed > free:
            raise ValueError(
                f"{self.home} needs {needed // 2**20:,} MiB for the pixels alone, and its disk has "
                f"{free / 2**20:,.0f} MiB: take another one, or a smaller --length"
            )

    def add(self, start: int, pixels: np.ndarray, state: Mapping[str, Tensor] | None) -> None:
        """Writes a strip that begins `start` pixels along the order, then the state after it; None: it was the last."""
        import torch
        from safetensors.torch import save

        self.put(start, pixels)
        written = start + pixels.shape[self.axis]
        tensors = {**(state or {"written": torch.tensor(written)}), **self.rest()}
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        text = json.dumps(self.told(written))
        metadata = {KEY: text, SUM: _sum(text, tensors)}
        place(self.state, lambda part: part.write_bytes(save(tensors, metadata)))  # save_file raises no OSError
        self.written = written

    def finish(self) -> None:
        """Everything in its final form, and nothing else left."""
        self.show()
        self.close()
        self.clear()

    def clear(self) -> None:
        """What was needed to go on goes."""
        for path in self.leftovers():
            path.unlink(missing_ok=True)
        if self.home != self.path:
            with suppress(OSError):  # something else is in it
                self.home.rmdir()

    def leftovers(self) -> Iterable[Path]:
        return (self.state,)

    def rest(self) -> dict[str, Tensor]:
        """What is kept in the state beside the stream's own."""
        return {}

    def close(self) -> None:
        """Lets go of what is open and held."""
        self.opened.close()

    # Of each kind.

    def open(self, state: Mapping[str, Tensor] | None) -> None:
        raise NotImplementedError

    def put(self, start: int, pixels: np.ndarray) -> None:
        """Has pixels on the disk, when it returns."""
        raise NotImplementedError

    def show(self) -> None:
        """What is finished, in its final form."""
        raise NotImplementedError


ELSE = "name another output, or delete it"


def _is_told(record: Any) -> bool:
    """Does it hold what `Output.told` writes? People edit what they can read."""
    parts = [record.get(name) if isinstance(record, dict) else None for name in ("said", "fitted", "machine", "stream")]
    if not all(isinstance(part, dict) for part in parts):
        return False
    written, length = (record["stream"].get(name) for name in ("written", "length"))
    return type(written) is type(length) is int and 0 <= written <= length


def _sum(text: str, tensors: Mapping[str, Tensor]) -> str:
    """Of all that a state holds: one that was changed is known by it, whatever was."""
    import torch

    total = zlib.crc32(text.encode())
    for name, tensor in sorted(tensors.items()):
        total = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), total)
        total = zlib.crc32(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes(), total)
    return f"{total:08x}"


def _source(settings: Mapping[str, Any]) -> str:
    return "--prompts" if settings.get("prompts") else f"the prompt {_short(settings.get('prompt'))}"


def _short(value: Any) -> str:
    if value is None:
        return "not said"
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= MOST_SHOWN else text[: MOST_SHOWN - 1] + "…"


class Picture(Output):
    """One picture. Until all is finished, its pixels are in a folder beside it."""

    def __init__(self, path: Path, axis: int, backwards: bool, pyramid: bool):
        super().__init__(path, path.with_name(f"{path.name}.unfinished"), axis, backwards)
        self.tiff, self.pyramid = path.suffix.lower() != ".png", pyramid
        check_target(path, PICTURES)
        if self.tiff:
            tiff_library()
        self.check()
        if self.home.exists() and not self.home.is_dir():
            raise ValueError(f"{self.home} is needed for unfinished pixels, and is no folder: {ELSE}")

    def open(self, state: Mapping[str, Tensor] | None) -> None:
        if not self.tiff and max(self.across, self.length) > MOST_PNG:
            raise ValueError(f"a PNG has at most {MOST_PNG:,} pixels a side: take a .tif or a folder")
        self.home.mkdir(exist_ok=True)
        self.hold()
        pixels = self.home / "pixels.raw"
        if state is not None and not pixels.exists():
            raise ValueError(f"{pixels} is gone, and is needed to go on with {self.path}: {ELSE}")
        self.room(3 * self.across * (self.length - self.written))
        size = (self.length, self.across) if self.axis == 0 else (self.across, self.length)
        self.canvas = self.opened.enter_context(Canvas(pixels, *size))

    def put(self, start: int, pixels: np.ndarray) -> None:
        first = self.length - start - pixels.shape[self.axis] if self.backwards else start
        self.canvas.write(*((first, 0) if self.axis == 0 else (0, first)), pixels)
        self.canvas.sync()

    def show(self) -> None:
        if not self.written:
            return
        first = self.length - self.written if self.backwards else 0
        across, along = (0, self.across), (first, self.written)
        (top, height), (left, width) = (along, across) if self.axis == 0 else (across, along)
        box, record = (top, left, height, width), self.told(self.written)
        if self.tiff:
            place(self.path, lambda part: write_tiff(part, self.canvas, box, record, self.pyramid))
        else:
            place(self.path, lambda part: write_png(part, self.canvas, box, record))

    def leftovers(self) -> Iterable[Path]:
        return (*self.home.glob("*.raw"), self.state)  # the state last: until then it is known what is there


class Slices(Output):
    """A folder of pictures of `size` pixels along the order each, the last one perhaps shorter, from 1 on."""

    def __init__(self, path: Path, axis: int, backwards: bool, size: int):
        super().__init__(path, path, axis, backwards)
        self.size = size
        self.pending: np.ndarray | None = None  # pixels that are no slice yet
        self.first = 0  # pixels along the order before them
        if path.exists() and not path.is_dir():
            raise ValueError(f"{path} is a file: name a folder, or a file that ends in {', '.join(PICTURES)}")
        self.check()

    def open(self, state: Mapping[str, Tensor] | None) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        self.hold()
        if state is not None and "pending" in state:
            self.pending = state["pending"].numpy()
            self.first = self.written - self.pending.shape[self.axis]
        if state is None:
            self.settings(0)

    def settings(self, written: int) -> None:
        text = json.dumps(self.told(written), ensure_ascii=True, indent=2)
        place(self.path / SETTINGS_FILE, lambda part: part.write_text(text + "\n"))

    def put(self, start: int, pixels: np.ndarray) -> None:
        joined = [pixels] if self.pending is None else [self.pending, pixels]
        pixels = np.concatenate(joined[::-1] if self.backwards else joined, self.axis)
        first = start + joined[-1].shape[self.axis] - pixels.shape[self.axis]  # a multiple of the size
        while pixels.shape[self.axis] >= self.size:
            self.save(first, self.cut(pixels, 0, self.size))
            pixels, first = self.cut(pixels, self.size, pixels.shape[self.axis]), first + self.size
        self.pending, self.first = pixels, first

    def cut(self, pixels: np.ndarray, start: int, stop: int) -> np.ndarray:
        n = pixels.shape[self.axis]
        along = slice(n - stop, n - start) if self.backwards else slice(start, stop)
        return pixels[along] if self.axis == 0 else pixels[:, along]

    def save(self, first: int, pixels: np.ndarray) -> None:
        from PIL import Image

        digits = max(4, len(str(-(-self.length // self.size))))
        record = self.told(first + pixels.shape[self.axis])
        file = self.path / f"{first // self.size + 1:0{digits}}.png"
        place(file, lambda part: write_image(part, Image.fromarray(pixels), record))

    def rest(self) -> dict[str, Tensor]:
        import torch

        assert self.pending is not None
        return {"pending": torch.from_numpy(np.ascontiguousarray(self.pending))}

    def show(self) -> None:
        if self.pending is not None and self.pending.shape[self.axis]:
            self.save(self.first, self.pending)
        self.settings(self.written)


def open_output(path: Path, axis: int, backwards: bool, size: int | None, pyramid: bool) -> Output:
    """Where a stream is written to, by its name. axis: of (height, width), that it grows along; size: of slices, None
    where none was said. ValueError, where it cannot be."""
    if path.suffix.lower() in PICTURES and not path.is_dir():
        if size is not None:
            raise ValueError(f"--slice is of a folder, and {path} is a file: leave it out, or name a folder")
        if pyramid and path.suffix.lower() == ".png":
            raise ValueError(f"--pyramid is of a .tif, and {path} is none: leave it out, or name a .tif")
        return Picture(path, axis, backwards, pyramid)
    if pyramid:
        raise ValueError(f"--pyramid is of a .tif, and {path} is none: leave it out, or name a .tif")
    if path.suffix and not path.is_dir():
        raise ValueError(f"{path} must end in {', '.join(PICTURES)}, or be a folder, whose name has no dot")
    assert size is not None
    return Slices(path, axis, backwards, size)
