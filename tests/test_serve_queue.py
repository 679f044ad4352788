"""The line before the model: places, an end to it, whoever leaves, and eight clients at once."""

import threading
import time
from contextlib import ExitStack, contextmanager

import pytest
import torch

openai = pytest.importorskip("openai")
httpx = pytest.importorskip("httpx")
pytest.importorskip("fastapi")

from own_serve import hosted  # noqa: E402

from benchmarks.serve import asked, load  # noqa: E402
from rolling_diffusion.serve import Studio, make_app  # noqa: E402

LONG = {"prompt": "a red ball", "size": "256x256", "steps": 100, "stream": True}
SHORT = LONG | {"size": "32x32", "steps": 1}


@contextmanager
def streamed(server_url, said):
    """The lines of a stream. They are held until it is closed: httpx closes a stream whose lines nobody holds."""
    with httpx.stream("POST", f"{server_url}/v1/images/generations", json=said, timeout=60) as answer:
        lines = answer.iter_lines()
        yield lines


def until(lines, start):
    for line in lines:
        if line.startswith(start):
            return line
    raise AssertionError(f"the stream ended before {start!r}")


def test_a_closed_stream_ends_within_one_call(server):
    ended = server.count("stopped_total")
    with streamed(server.url, LONG) as lines:
        until(lines, ": call 2")
        before = server.count("calls_total")
    server.until(server.idle)
    assert server.count("calls_total") - before <= 2  # one was counted as the stream closed, one was under way
    assert server.count("stopped_total") == ended + 1


def test_a_closed_connection_ends_within_one_call(server):
    ended = server.count("stopped_total")
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{server.url}/v1/images/generations", json=LONG | {"stream": False}, timeout=1.5)
    closed = server.count("calls_total")
    server.until(server.idle)
    assert server.count("calls_total") - closed <= 2 and server.count("stopped_total") == ended + 1


def test_everyone_knows_the_own_place(server):
    with ExitStack() as first, ExitStack() as second, ExitStack() as behind:
        until(first.enter_context(streamed(server.url, LONG)), ": call")
        assert until(second.enter_context(streamed(server.url, SHORT)), ": place") == ": place 1 of 2"
        third = behind.enter_context(streamed(server.url, SHORT))
        assert until(third, ": place") == ": place 2 of 3"
        health = server.get("/health").json()
        assert (health["drawing"], health["waiting"]) == (1, 2)
        second.close()  # whoever stands behind moves up
        assert until(third, ": place") == ": place 1 of 2"
        first.close()
        assert until(third, "event: ") == "event: image_generation.completed"
    server.until(server.idle)


def test_a_full_line_is_said_so(rolled):
    with hosted(make_app(Studio(rolled, "embedded", most=2))) as url, streamed(url, LONG) as first:
        until(first, ": call")
        with streamed(url, LONG) as second:
            until(second, ": place 1 of 2")
            client = openai.OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0)
            with pytest.raises(openai.InternalServerError, match="queue is full, with 2 requests") as caught:
                client.images.generate(prompt="a red ball")
            assert caught.value.status_code == 503 and caught.value.code == "queue_full"
            assert caught.value.response.headers["retry-after"] == "5"


def test_a_server_that_is_told_to_stop_stops_drawing(rolled):
    with ExitStack() as stream:
        with hosted(make_app(Studio(rolled, "embedded"))) as url:
            until(stream.enter_context(streamed(url, LONG)), ": call")
            started = time.monotonic()
        assert time.monotonic() - started < 15  # of a picture that takes minutes
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("model")]


def test_what_fails_while_drawing_is_told_and_the_next_one_is_drawn(rolled, monkeypatch):
    class Failing:
        """The embedded pipeline, which fails where it is told to."""

        def __getattr__(self, name):
            return getattr(rolled, name)

        def __call__(self, *args, **options):
            if options["prompt"] == "fail":
                raise RuntimeError("secret")
            if options["prompt"] == "much":
                torch.empty(2**62, dtype=torch.uint8)
            return rolled(*args, **options)

    with hosted(make_app(Studio(Failing(), "embedded"))) as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0)
        with pytest.raises(openai.InternalServerError, match="error while drawing") as caught:
            client.images.generate(prompt="fail")
        assert "secret" not in caught.value.response.text and caught.value.type == "server_error"
        with pytest.raises(openai.APIError, match="error while drawing"):
            list(client.images.generate(prompt="fail", stream=True))
        with pytest.raises(openai.InternalServerError, match="Out of memory: a smaller size needs less"):
            client.images.generate(prompt="much")
        assert client.images.generate(prompt="a", size="32x32", extra_body={"steps": 1}).data


def test_eight_clients_are_served_fairly(server):
    told = load(server.url, clients=8, seconds=4)
    assert not told.errors and not told.wrong, (told.errors, told.wrong)
    assert min(told.counts) >= 1 and max(told.counts) - min(told.counts) <= 1
    assert server.idle()


def test_what_the_load_expects_is_the_pipelines_own(server, rolled):
    import base64
    import io

    import numpy as np
    from PIL import Image

    said = asked(3)
    answer = httpx.post(f"{server.url}/v1/images/generations", json=said, timeout=60).json()["data"][0]
    image = Image.open(io.BytesIO(base64.b64decode(answer["b64_json"])))
    own = rolled(
        said["prompt"],
        width=64,
        height=64,
        num_inference_steps=said["steps"],
        cfg=said["cfg"],
        generator=torch.Generator().manual_seed(said["seed"]),
    ).images[0]
    assert np.array_equal(np.asarray(image), np.asarray(own))
