"""The picture appearing: what may be seen of it in each tick, as a GIF, a WebP or an MP4."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..appearing import Veil
from .files import put

if TYPE_CHECKING:
    from PIL import Image

SUFFIXES = (".gif", ".webp", ".mp4")
MOST_FRAMES = 30  # of an animation; a longer run is sampled evenly
SECONDS, HOLD = 4.0, 1.5  # that it lasts, and that its last frame is held for after that


class Film:
    """Collects pictures of a run as it appears."""

    def __init__(self) -> None:
        self.veil = Veil()
        self.frames: list[Image.Image] = []

    def add(self, tick: Any, preview: Callable[[Any], Image.Image]) -> None:
        """preview: the model's guess at the picture, from a tick; asked for where the frame is kept."""
        self.veil.tell(tick)
        if tick.number % max(1, -(-tick.total // MOST_FRAMES)) == 0:
            self.frames.append(self.veil.over(preview(tick)))


def save_animation(path: Path, frames: Sequence[Image.Image]) -> Path:
    """Frames of one size, as an animation of the kind that the suffix says."""
    each = min(0.2, max(0.04, SECONDS / len(frames)))
    kind = path.suffix.lower()
    if kind == ".mp4":
        held = [*frames, *[frames[-1]] * round(HOLD / each)]
        return put(path, lambda part: _write_mp4(part, held, 1 / each))
    milliseconds = [round(1000 * each)] * (len(frames) - 1) + [round(1000 * HOLD)]
    options: dict[str, Any] = {"save_all": True, "duration": milliseconds, "loop": 0, "format": kind[1:].upper()}
    if kind == ".webp":
        options |= {"quality": 85, "method": 4}
    if kind == ".gif":
        frames = [_dithered(frame) for frame in frames]
    return put(path, lambda part: frames[0].save(part, append_images=list(frames[1:]), **options))


def _dithered(frame: Image.Image) -> Image.Image:
    """In 256 colours, small spots of colour among them, and without bands in soft gradients."""
    from PIL import Image

    palette = frame.quantize(method=Image.Quantize.MAXCOVERAGE, kmeans=1)
    return frame.quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG)


def check_mp4() -> None:
    """ValueError if no MP4 can be written here."""
    try:
        import imageio_ffmpeg  # pyright: ignore[reportMissingImports]

        imageio_ffmpeg.get_ffmpeg_exe()
    except (ImportError, RuntimeError):
        raise ValueError(
            "mp4 needs ffmpeg: run pip install imageio-ffmpeg, or choose a .gif or .webp animation"
        ) from None


def _write_mp4(path: Path, frames: Sequence[Image.Image], rate: float) -> None:
    import imageio_ffmpeg  # pyright: ignore[reportMissingImports]

    # The muxer is named, as the part of a file that is being written does not end in .mp4.
    how: dict[str, Any] = {
        "quality": 7,
        "ffmpeg_log_level": "quiet",
        "output_params": ["-movflags", "+faststart", "-f", "mp4"],
        "fps": rate,
    }
    writer = imageio_ffmpeg.write_frames(str(path), frames[0].size, **how)
    writer.send(None)
    for frame in frames:
        writer.send(frame.convert("RGB").tobytes())
    writer.close()
    try:  # ffmpeg's exit status is not passed on: a file that was cut short is known by its frames
        written, _ = imageio_ffmpeg.count_frames_and_secs(str(path))
    except RuntimeError:
        written = 0
    if written != len(frames):
        raise OSError("ffmpeg could not finish the file")
