"""Errors as OpenAI gives them: one line of JSON, with a sentence, a kind, the parameter and a code."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi.responses import JSONResponse

INVALID, SERVER = "invalid_request_error", "server_error"
# What pydantic says of a type, in a caller's words; and OpenAI's codes of numbers out of range.
TYPES = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "string": "a text",
    "model": "an object",
    "dict": "an object",
}
BOUNDS = {
    "greater_than": ("invalid_value", "above {gt}"),
    "string_too_long": ("string_above_max_length", "at most {max_length} letters long"),
    "greater_than_equal": ("integer_below_min_value", "at least {ge}"),
    "less_than_equal": ("integer_above_max_value", "at most {le}"),
}


class Refusal(Exception):
    """Why a request is not answered: one sentence, and the status that OpenAI gives."""

    def __init__(
        self,
        message: str,
        status: int = 400,
        *,
        param: str | None = None,
        code: str | None = None,
        kind: str = INVALID,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code, self.kind, self.headers = status, param, code, kind, headers

    @property
    def body(self) -> dict[str, Any]:
        sentence = " ".join(str(self).split())
        return {"error": {"message": sentence, "type": self.kind, "param": self.param, "code": self.code}}

    @property
    def response(self) -> JSONResponse:
        return JSONResponse(self.body, self.status, headers=self.headers)


def wrong_value(name: str, sentence: str, code: str = "invalid_value") -> Refusal:
    return Refusal(f"Invalid value for '{name}': {sentence}.", param=name, code=code)


def missing(name: str) -> Refusal:
    return Refusal(f"Missing required parameter: '{name}'.", param=name, code="missing_required_parameter")


def unknown(name: str) -> Refusal:
    return Refusal(f"Unknown parameter: {name!r}.", param=name, code="unknown_parameter")


def wrong_picture(name: str, why: str) -> Refusal:
    return Refusal(f"Invalid picture in '{name}': {why}.", param=name, code="invalid_image_file")


def full(most: int) -> Refusal:
    return Refusal(
        f"The queue is full, with {most} requests in it: try again later.",
        503,
        code="queue_full",
        kind=SERVER,
        headers={"Retry-After": "5"},
    )


def broken() -> Refusal:
    return Refusal("The server had an error while drawing: its own log says more.", 500, kind=SERVER)


def of_pydantic(errors: list[Any]) -> Refusal:
    """The first of the errors that pydantic found in a request, as a sentence. Long values are shown cut."""
    error = errors[0]
    kind = error["type"]
    path = [part for part in error["loc"] if part != "body"]
    name = next((part[:60] for part in path if isinstance(part, str)), None)
    if kind == "json_invalid" or name is None:
        return Refusal("The body is no JSON object: check its brackets and quotes, and the content type.")
    if kind == "missing":
        return missing(name)
    if kind == "extra_forbidden":
        return unknown(name)
    if kind in BOUNDS:
        code, bound = BOUNDS[kind]
        sentence = f"it must be {bound.format(**error['ctx'])}"
        return wrong_value(name, sentence, code if isinstance(error["input"], (int, str)) else "invalid_value")
    if kind == "literal_error":
        return wrong_value(name, f"it must be {error['ctx']['expected'].replace(chr(39), '')}")
    if kind == "value_error":
        return wrong_value(name, str(error["ctx"]["error"]))
    expected = next((words for start, words in TYPES.items() if kind.startswith(start)), None)
    if expected is None:
        return wrong_value(name, error["msg"][0].lower() + error["msg"][1:200])
    return Refusal(f"Invalid type for '{name}': it must be {expected}.", param=name, code="invalid_type")
