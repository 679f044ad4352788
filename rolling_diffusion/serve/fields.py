"""What a request may say: OpenAI's parameters, and those of rolling beside them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from ..core.order import ORDERS
from ..defaults import EVERYWHERE, LAST_SEED

LONGEST = 32_000  # letters of a prompt, as with OpenAI
MOST_FRAMES = 60
# Share of the model's own steps that a quality takes, unless steps says how many.
QUALITY = {"auto": 1.0, "low": 0.5, "medium": 1.0, "standard": 1.0, "high": 2.0, "hd": 2.0}
Whole = Annotated[int, Field(ge=0)]


class Generation(BaseModel):
    """A request for pictures of a prompt. null is the same as leaving a parameter out."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())

    prompt: Annotated[str, Field(max_length=LONGEST)]
    model: str | None = None
    n: Annotated[int, Field(ge=1)] = 1
    size: str = "auto"
    quality: Literal["auto", "low", "medium", "standard", "high", "hd"] = "auto"
    background: Literal["auto", "opaque"] = "auto"
    output_format: Literal["png", "jpeg", "webp"] = "png"
    output_compression: Annotated[int, Field(ge=0, le=100)] | None = None
    response_format: Literal["b64_json", "url"] = "b64_json"
    stream: bool = False
    partial_images: Annotated[int, Field(ge=0, le=3)] = 0
    # Of the caller, for the maker of the model: taken, and of no effect here.
    user: str | None = None
    safety_identifier: str | None = None
    moderation: Literal["auto", "low"] | None = None
    # Rolling's own.
    order: str = "top-to-bottom"
    window: Annotated[int, Field(ge=1)] | None = None
    overlap: Whole | None = None
    attention_persistence: Annotated[float, Field(ge=0, le=1)] = 1.0
    draft: Whole | None = None
    lookahead: int | str = "auto"
    lag: int | str | None = None
    extrapolation: Annotated[float, Field(ge=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=0, le=LAST_SEED)] | None = None
    steps: Annotated[int, Field(ge=1)] | None = None
    cfg: Annotated[float, Field(ge=0)] | None = None
    negative_prompt: Annotated[str, Field(max_length=LONGEST)] = ""
    frames: Annotated[int, Field(ge=0, le=MOST_FRAMES)] = 0

    @model_validator(mode="before")
    @classmethod
    def _without_null(cls, data: Any) -> Any:
        return {name: value for name, value in data.items() if value is not None} if isinstance(data, dict) else data

    @field_validator("prompt")
    @classmethod
    def _words(cls, prompt: str) -> str:
        if not prompt.strip():
            raise ValueError("it holds no words")
        return prompt

    @field_validator("size")
    @classmethod
    def _sides(cls, size: str) -> str:
        if size != "auto" and not re.fullmatch(r"[0-9]{1,6}x[0-9]{1,6}", size):
            raise ValueError("it must be auto, or a width and a height such as 1024x1024")
        return size

    @field_validator("order")
    @classmethod
    def _order(cls, order: str) -> str:
        if order not in ORDERS:
            raise ValueError(f"it must be one of {', '.join(ORDERS)}")
        return order

    @field_validator("lookahead", "lag", mode="before")
    @classmethod
    def _number_or_word(cls, value: Any, info: Any) -> Any:
        words = ("auto", EVERYWHERE) if info.field_name == "lookahead" else ("autoregressive",)
        if isinstance(value, str) and re.fullmatch("[0-9]{1,9}", value):  # of a form
            value = int(value)
        whole = isinstance(value, int) and not isinstance(value, bool) and value >= 0
        if not whole and not (isinstance(value, str) and value in words):
            raise ValueError(f"it must be a whole number of at least 0, or {' or '.join(words)}")
        return value

    @property
    def sides(self) -> tuple[int, int] | None:
        """Width and height in pixels, if they are said."""
        if self.size == "auto":
            return None
        width, height = self.size.split("x")
        return int(width), int(height)


class Edit(Generation):
    """A request for pictures that start from one. strength: how much of it is drawn anew."""

    strength: Annotated[float, Field(gt=0, le=1)] | None = None

    @classmethod
    def of_form(cls, fields: Mapping[str, str]) -> Edit:
        """From the fields of a form, which are texts. pydantic.ValidationError as ever."""
        return cls.model_validate(dict(fields), strict=False)
