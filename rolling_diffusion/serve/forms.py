"""Forms with pictures, which stay in memory from beginning to end."""

from __future__ import annotations

from dataclasses import replace

from fastapi import Request
from pydantic import ValidationError
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser

from ..defaults import Card
from .errors import Refusal, missing, of_pydantic, unknown, wrong_picture
from .fields import Edit
from .job import Job, Limits, make_job
from .pictures import clear_parts, opened, scaled

MOST_FILES, MOST_FIELDS, FIELD_BYTES = 3, 60, 200_000
PICTURES = ("image", "mask")


async def read_form(request: Request, most: int) -> tuple[Edit, dict[str, bytes]]:
    """What a form says, and the files in it, at most so many bytes; Refusal for anything but that.

    An own parser, as request.form() writes what is larger than a megabyte to disk.
    """
    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
        raise Refusal("Edits come as multipart/form-data, with the picture as a file.", 415)
    parser = MultiPartParser(
        request.headers,
        request.stream(),
        max_files=MOST_FILES,
        max_fields=MOST_FIELDS,
        max_part_size=FIELD_BYTES,
    )
    for name in ("spool_max_size", "max_file_size"):  # its newer and its older name
        setattr(parser, name, most + 1)
    try:
        form = await parser.parse()
    except MultiPartException as error:
        raise Refusal(f"The form cannot be read: {error.message}") from None
    except (HTTPException, Refusal):
        raise
    except Exception:  # of a broken body
        raise Refusal("The form cannot be read.") from None
    said: dict[str, str] = {}
    files: dict[str, bytes] = {}
    for name, value in form.multi_items():
        home = "image" if name == "image[]" else name
        if (home in said) or (home in files):
            raise Refusal(f"'{home[:60]}' is given twice, and only one is taken.", param=home[:60])
        if isinstance(value, UploadFile):
            if home not in PICTURES:
                raise unknown(name[:60])
            files[home] = await value.read()
        elif home in PICTURES:
            raise Refusal(f"'{home}' must be a file.", param=home, code="invalid_type")
        else:
            said[home] = value
    await form.close()
    if "image" not in files:
        raise missing("image")
    try:
        return Edit.of_form(said), files
    except ValidationError as error:
        raise of_pydantic(list(error.errors())) from None


def make_edit(fields: Edit, files: dict[str, bytes], card: Card, limits: Limits) -> Job:
    """A job of a form. What is clear in the mask, or without one in the picture, is drawn anew; all else is given."""
    image = opened(files["image"], "image")
    mask = clear_parts(image)
    if "mask" in files:
        mask = clear_parts(opened(files["mask"], "mask"))
        if mask is None:
            raise wrong_picture("mask", "nothing in it is transparent, so nothing is to be drawn")
    job = make_job(fields, card, limits, image, mask)
    size = job.width, job.height
    return replace(job, image=scaled(image.convert("RGB"), size), mask=None if mask is None else scaled(mask, size))
