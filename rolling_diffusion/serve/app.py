"""The application: OpenAI's image API, a page, health and metrics, around a studio."""

from __future__ import annotations

import asyncio
import base64
import os
import re
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Annotated, Any

from fastapi import Body, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException

from ..core.order import ORDERS
from .answers import EventStream, described, finished
from .errors import Refusal, broken, of_pydantic, wrong_value
from .fields import Generation
from .forms import make_edit, read_form
from .guard import Guard, log
from .job import Job, Limits, make_job
from .studio import Finished, Studio

PAGE = Path(__file__).parent / "page"
PAGES = {
    "/": ("page.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
}
UPLOAD = 20 * 2**20  # most bytes of a form with pictures
FORMS = 4  # that are read, and whose pictures are decoded, at a time: so many uploads are in memory at most
NAME = re.compile(r"[0-9a-f]{32}\.(png|jpeg|webp)")  # of a picture, in its URL; none that can be guessed
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def make_app(
    studio: Studio,
    *,
    limits: Limits | None = None,
    key: str | None = None,
    folder: Path | None = None,
) -> FastAPI:
    """The application, for uvicorn or whatever else serves ASGI.

    key: that callers have to bring. folder: where pictures are written, so that they can be had by URL; None: nowhere.
    """
    limits = limits or Limits.of(studio.card)
    card = studio.card
    model = {
        "id": studio.name,
        "object": "model",
        "created": studio.created,
        "owned_by": "rolling-diffusion",
        "rolling": {"size": card.size, "steps": card.steps, "orders": [*ORDERS], "most_pixels": limits.pixels},
    }
    forms = asyncio.Semaphore(FORMS)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await studio.close()

    app = FastAPI(title="Autoregressive Rolling Diffusion", docs_url=None, redoc_url=None, lifespan=lifespan)
    app.add_middleware(
        Guard,
        key=key,
        open_paths={*PAGES, "/health"},
        upload=UPLOAD,
        metrics=studio.metrics,
    )

    def check_model(name: str | None) -> None:
        if name is not None and name != studio.name:
            raise Refusal(
                f"The model {name[:60]!r} does not exist here: it is {studio.name!r}.",
                404,
                param="model",
                code="model_not_found",
            )

    def check_url(fields: Generation) -> None:
        if fields.response_format == "url" and (folder is None or fields.stream):
            why = "a stream carries pictures, so take b64_json" if folder else "this server writes no files"
            raise wrong_value("response_format", why)

    def link(folder: Path, job: Job, picture: Finished, request: Request) -> str | None:
        """Where the picture is now; None where it cannot be written."""
        name = f"{secrets.token_hex(16)}.{job.fields.output_format}"
        path = folder / f"{time.strftime('%Y%m%d-%H%M%S')}-{picture.seed}-{name}"
        part = path.with_name(f".{name}.part")  # no picture yet
        try:
            part.write_bytes(picture.content)
            os.replace(part, path)
        except OSError as error:
            log.warning("cannot write %s: %s", path, error.strerror)
            with suppress(OSError):
                part.unlink()
            return None
        return str(request.url_for("picture", name=name))

    async def answer(request: Request, job: Job) -> Response:
        run = studio.start(job)
        if job.fields.stream:
            return EventStream(run)
        place = run.ticket.place
        pictures = await finished(request, run)
        data: list[dict[str, Any]] = []
        for picture in pictures:
            url = None
            if folder is not None and job.fields.response_format == "url":
                url = await asyncio.to_thread(link, folder, job, picture, request)
            # A picture is never lost: what cannot be written is carried.
            way = {"url": url} if url else {"b64_json": base64.b64encode(picture.content).decode()}
            data.append(way | {"seed": picture.seed})
        content = {"created": int(time.time()), "data": data, **described(job), "usage": run.usage}
        return JSONResponse(content, headers={"X-Queue-Place": str(place)})

    @app.post("/v1/images/generations")
    async def generations(request: Request, fields: Annotated[Generation, Body()]) -> Response:
        check_model(fields.model)
        check_url(fields)
        return await answer(request, make_job(fields, studio.card, limits))

    @app.post("/v1/images/edits")
    async def edits(request: Request) -> Response:
        async with forms:
            fields, files = await read_form(request, UPLOAD)
            check_model(fields.model)
            check_url(fields)
            job = await asyncio.to_thread(make_edit, fields, files, card, limits)
            del files
        return await answer(request, job)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [model]}

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> dict[str, Any]:
        check_model(name)
        return model

    @app.get("/pictures/{name}")
    async def picture(name: str) -> Response:
        path = await asyncio.to_thread(written, folder, name) if folder is not None else None
        if path is None:
            raise Refusal("There is no such picture.", 404)
        return FileResponse(path)

    @app.get("/health")
    async def health() -> dict[str, Any]:
        length = len(studio.line)
        return {
            "status": "ok",
            "model": studio.name,
            "drawing": min(length, 1),
            "waiting": max(length - 1, 0),
            "queue": studio.line.most,
        }

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(studio.metrics.page(), media_type=CONTENT_TYPE_LATEST)

    for path, (name, kind) in PAGES.items():
        app.add_api_route(path, page(name, kind), include_in_schema=False)

    @app.exception_handler(Refusal)
    async def refused(request: Request, error: Refusal) -> Response:
        return error.response

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        return of_pydantic(list(error.errors())).response

    @app.exception_handler(HTTPException)
    async def failed(request: Request, error: HTTPException) -> Response:
        where = f"{request.method[:10]} {ascii(request.url.path[:100])[1:-1]}"
        sentence = {404: f"Invalid URL ({where}).", 405: f"Not allowed: {where}."}.get(error.status_code, error.detail)
        return Refusal(sentence, error.status_code, headers=error.headers).response

    @app.exception_handler(Exception)
    async def crashed(request: Request, error: Exception) -> Response:
        return broken().response

    return app


def written(folder: Path, name: str) -> Path | None:
    """The picture of that name in its URL, whichever process wrote it. No path is made of what a request says: it is
    one of those in the folder, or none."""
    return next(folder.glob(f"*-{name}"), None) if NAME.fullmatch(name) else None


def page(name: str, kind: str) -> Callable[[], Awaitable[Response]]:
    """A route to a file of the page, which is read once, and may load nothing from elsewhere."""
    content = (PAGE / name).read_bytes()
    headers = {"Content-Security-Policy": POLICY, "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}

    async def route() -> Response:
        return Response(content, media_type=kind, headers=headers)

    return route
