"""What a picture records of how it was made: JSON in a text chunk of a PNG, in the words of `generate`'s options.

What was said stays apart from what was fitted to it and from the machine's own: `generate --from` says it again. And a
picture of any depth, read without loss of what can be seen.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Any, cast

from PIL import Image, PngImagePlugin

KEY = "rolling-diffusion"  # of the text chunk
MACHINE = ("device", "dtype", "cpu_offload")


def record(version: str, said: Collection[str], settings: Mapping[str, Any]) -> dict[str, Any]:
    """version: of the package. said: names of the settings that were said. settings: all, as JSON is to hold them."""
    return {
        "version": version,
        "said": {name: value for name, value in settings.items() if name in said and name not in MACHINE},
        "fitted": {name: value for name, value in settings.items() if name not in {*said, *MACHINE}},
        "machine": {name: settings[name] for name in MACHINE if name in settings},
    }


def chunk(content: Mapping[str, Any] | None) -> PngImagePlugin.PngInfo:
    """What Pillow takes as `pnginfo`."""
    info = PngImagePlugin.PngInfo()
    if content is not None:
        info.add_itxt(KEY, as_json(content).decode())
    return info


def as_json(content: Any, indent: int | None = None) -> bytes:
    # Of a file's name that is no valid text, the odd bytes are written as JSON's own escapes.
    return json.dumps(content, indent=indent, ensure_ascii=False).encode("utf-8", "backslashreplace")


def in_eight_bits(image: Image.Image) -> Image.Image:
    """A picture of 16 bits in 8, which Pillow itself clips to white; any other as it is. ValueError for pixels of 32
    bits, of which nothing says what is white."""
    if image.mode not in ("I", "F") and not image.mode.startswith("I;16"):
        return image
    low, high = cast(tuple[float, float], image.getextrema())
    if image.mode == "F" or not 0 <= low <= high < 2**16:
        raise ValueError("has pixels of 32 bits: save it with 8 or 16")
    return image.convert("I").point(lambda value: value * (1 / 257) + 0.5).convert("L")
