"""Pictures that come in, and pictures that go out."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

from PIL import Image, ImageOps

from ..recording import chunk, in_eight_bits
from .errors import Refusal, wrong_picture

FORMATS = ("PNG", "JPEG", "WEBP")
PIXELS = 2**24  # of an upload: far below Pillow's own limit


def opened(content: bytes, name: str) -> Image.Image:
    """An uploaded picture, upright, with its transparency; Refusal if it is none, or too large.

    It is decoded from memory, and its size is known, and held to the limit, before its pixels are.
    """
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            if image.width * image.height > PIXELS:
                raise wrong_picture(name, f"it has more than {PIXELS:,} pixels")
            clear = "RGBA" if image.has_transparency_data else "RGB"
            return in_eight_bits(ImageOps.exif_transpose(image)).convert(clear)
    except Refusal:
        raise
    except Image.DecompressionBombError:
        raise wrong_picture(name, f"it has more than {PIXELS:,} pixels") from None
    except Exception:  # whatever a damaged file makes of the reader
        raise wrong_picture(name, "it is no PNG, JPEG or WebP picture that can be read") from None


def clear_parts(image: Image.Image) -> Image.Image | None:
    """What is transparent in a picture, white on black; None if nothing is."""
    if image.mode != "RGBA":
        return None
    clear = ImageOps.invert(image.getchannel("A"))
    return clear if clear.getbbox() else None


def scaled(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """As diffusers scales a picture to the canvas; done before it waits in line, so that it takes less memory there."""
    return image if image.size == size else image.resize(size, Image.Resampling.LANCZOS)


def encoded(
    image: Image.Image, kind: str, quality: int | None = None, record: Mapping[str, Any] | None = None
) -> bytes:
    """A file of a picture; kind: png, jpeg or webp; quality: of the latter two, 0 to 100; record: of the first."""
    file = io.BytesIO()
    options = {"pnginfo": chunk(record)} if kind == "png" else {"quality": 95 if quality is None else quality}
    image.convert("RGB").save(file, format=kind.upper(), **options)
    return file.getvalue()
