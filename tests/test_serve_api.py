"""OpenAI's image API, asked by OpenAI's own client, unmodified, of the real server."""

import base64
import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

openai = pytest.importorskip("openai")
import httpx  # noqa: E402

from rolling_diffusion import roll  # noqa: E402
from rolling_diffusion.cli import main  # noqa: E402
from rolling_diffusion.loading import starting  # noqa: E402

PROMPT = "a red ball above a blue boat"
SMALL = {"size": "64x64", "extra_body": {"steps": 3, "seed": 7}}


@pytest.fixture()
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0, timeout=60) as client:
        yield client


def opened(b64_json):
    image = Image.open(io.BytesIO(base64.b64decode(b64_json)))
    image.load()
    return image


def pixels(image):
    return np.asarray(image.convert("RGB")).astype(int)


def drawn(pipeline, seed=7, side=64, steps=3, **options):
    options = {"width": side, "height": side, "num_inference_steps": steps} | options
    return pipeline(PROMPT, generator=torch.Generator().manual_seed(seed), **options).images[0]


def file_of(image, name="picture.png"):
    content = io.BytesIO()
    image.save(content, format="PNG")
    return name, content.getvalue(), "image/png"


def scene():
    image = Image.new("RGB", (64, 64), (60, 120, 200))
    image.paste((220, 60, 40), (0, 0, 64, 24))
    return image


def masked(box):
    mask = Image.new("RGBA", (64, 64), (0, 0, 0, 255))
    mask.paste((0, 0, 0, 0), box)
    return mask


def test_a_picture_is_the_pipelines_own(client, rolled):
    answer = client.images.generate(prompt=PROMPT, **SMALL)
    assert answer.size == "64x64" and answer.output_format == "png" and answer.data[0].seed == 7
    assert np.array_equal(pixels(opened(answer.data[0].b64_json)), pixels(drawn(rolled)))
    assert answer.usage.output_tokens == 16 and answer.usage.input_tokens_details.text_tokens >= 8


def test_a_picture_records_what_generate_says_again(client, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    said = {"order": "left-to-right", "window": 4, "overlap": 2, "attention_persistence": 0.5, "lookahead": 2}
    said |= {"lag": 2, "draft": 1, "extrapolation": 0.5}
    for body in ({"steps": 3, **said, "cfg": 1.5, "negative_prompt": "a tree"}, {}):
        more = {"size": "64x64", "n": 2} if body else {"size": "64x80", "quality": "low"}
        answer = client.images.generate(prompt=PROMPT, **more, extra_body={"seed": 7, **body})
        file = tmp_path / "picture.png"
        file.write_bytes(base64.b64decode(answer.data[-1].b64_json))
        assert main(["generate", "--from", str(file), "-o", "again.png", "--device", "cpu"]) == 0
        assert np.array_equal(pixels(Image.open("again.png")), pixels(Image.open(file)))
        assert "note:" not in capsys.readouterr().err
    edited = client.images.edit(image=file_of(scene()), prompt=PROMPT, extra_body={"steps": 2})
    file.write_bytes(base64.b64decode(edited.data[0].b64_json))
    assert main(["generate", "--from", str(file)]) == 2
    assert "--image must name a file that is here" in capsys.readouterr().err


def test_several_pictures_have_seeds_in_a_row(client, rolled):
    answer = client.images.generate(prompt=PROMPT, n=2, **SMALL)
    assert [picture.seed for picture in answer.data] == [7, 8]
    assert np.array_equal(pixels(opened(answer.data[1].b64_json)), pixels(drawn(rolled, 8)))


def test_what_rolling_takes_goes_through(client, rolled):
    said = {
        "order": "left-to-right",
        "window": 4,
        "overlap": 2,
        "attention_persistence": 0.5,
        "draft": 1,
        "lookahead": 2,
    }
    said |= {"lag": 2, "cfg": 1.5, "negative_prompt": "a tree"}
    answer = client.images.generate(prompt=PROMPT, size="64x64", extra_body={"steps": 3, "seed": 7, **said})
    assert np.array_equal(pixels(opened(answer.data[0].b64_json)), pixels(drawn(rolled, **said)))


def test_an_order_decided_late_streams(client, rolled):
    said = {"order": "difficulty", "draft": 2, "extrapolation": 0.4, "window": 4, "overlap": 0}
    events = list(
        client.images.generate(
            prompt=PROMPT, size="64x64", stream=True, partial_images=2, extra_body={"steps": 4, "seed": 7, **said}
        )
    )
    assert [event.type for event in events] == ["image_generation.partial_image"] * 2 + ["image_generation.completed"]
    assert np.array_equal(pixels(opened(events[-1].b64_json)), pixels(drawn(rolled, steps=4, **said)))


def test_without_a_seed_pictures_differ(client):
    first, second = (
        client.images.generate(prompt=PROMPT, size="32x32", extra_body={"steps": 1}).data[0] for _ in range(2)
    )
    assert first.seed != second.seed and first.b64_json != second.b64_json


@pytest.mark.parametrize("kind, name", [("png", "PNG"), ("jpeg", "JPEG"), ("webp", "WEBP")])
def test_formats(client, kind, name):
    said = {"output_compression": 40} if kind != "png" else {}
    answer = client.images.generate(prompt=PROMPT, output_format=kind, **said, **SMALL)
    assert opened(answer.data[0].b64_json).format == name and answer.output_format == kind


def test_quality_is_a_share_of_the_models_steps(server, client):
    before = server.count("calls_total")
    client.images.generate(prompt=PROMPT, size="32x32", quality="low", extra_body={"lag": 0})
    assert server.count("calls_total") - before == 10


def test_a_picture_appears_from_the_top(client, rolled):
    """Partial pictures: what is finished is final, and what is not is blurred."""
    said = {"prompt": PROMPT, "size": "128x128", "extra_body": {"steps": 4, "seed": 7, "window": 8, "overlap": 4}}
    *partials, last = client.images.generate(stream=True, partial_images=3, **said)
    assert [event.type for event in partials] == ["image_generation.partial_image"] * 3
    assert [event.partial_image_index for event in partials] == [0, 1, 2]
    assert last.type == "image_generation.completed" and last.size == "128x128" and last.usage.output_tokens == 64
    final = pixels(opened(last.b64_json))
    assert np.array_equal(final, pixels(drawn(rolled, side=128, steps=4, window=8, overlap=4)))
    seen = [pixels(opened(event.b64_json)) for event in partials]
    assert np.abs(seen[0][:16] - final[:16]).max() < 5  # one of four strips, but for where it fades; then all but one
    assert np.abs(seen[2][:72] - final[:72]).max() < 5
    detail = [np.abs(np.diff(picture[96:], axis=1)).mean() for picture in (*seen, final)]
    assert detail[0] < 0.7 * detail[-1]


def test_no_partial_pictures_unless_asked(client):
    (only,) = client.images.generate(prompt=PROMPT, stream=True, **SMALL)
    assert only.type == "image_generation.completed"


def test_a_stream_of_two_pictures_completes_twice(client):
    kinds = [event.type for event in client.images.generate(prompt=PROMPT, stream=True, n=2, partial_images=1, **SMALL)]
    assert kinds == ["image_generation.partial_image", "image_generation.completed"] * 2


def test_an_edit_draws_where_the_mask_is_clear(client, rolled):
    box = (0, 32, 64, 64)
    answer = client.images.edit(
        image=file_of(scene()), mask=file_of(masked(box)), prompt=PROMPT, extra_body={"steps": 4, "seed": 7}
    )
    edited = pixels(opened(answer.data[0].b64_json))
    assert answer.size == "64x64" and answer.usage.input_tokens_details.image_tokens == 16
    kept, new = np.abs(edited - pixels(scene()))[:20], np.abs(edited - pixels(scene()))[40:]
    assert kept.mean() < 15 < 50 < new.mean()  # it comes and goes through the VAE
    painter = roll(starting(rolled.pipe, "mask"), rolled.card)
    mask = Image.new("L", (64, 64))
    mask.paste(255, box)
    same = drawn(painter, steps=4, image=scene(), mask_image=mask, strength=1.0)
    assert np.array_equal(edited, pixels(same))


def test_an_edit_without_a_mask_starts_from_the_picture(client):
    said = {"image": file_of(scene()), "prompt": PROMPT}
    near, far = (
        pixels(opened(client.images.edit(**said, extra_body={"steps": 4, "seed": 7, "strength": s}).data[0].b64_json))
        for s in (0.3, 1.0)
    )
    start = pixels(scene())
    assert np.abs(near - start).mean() < np.abs(far - start).mean()


def test_what_is_clear_in_the_picture_is_its_mask(client):
    image = scene().convert("RGBA")
    image.paste((0, 0, 0, 0), (0, 32, 64, 64))
    one, two = (
        client.images.edit(**said, prompt=PROMPT, extra_body={"steps": 2, "seed": 7}).data[0].b64_json
        for said in (
            {"image": file_of(image)},
            {"image": file_of(image), "mask": file_of(masked((0, 32, 64, 64)))},
        )
    )
    assert one == two


def test_an_edit_streams(client):
    said = {"image": [file_of(scene())], "mask": file_of(masked((0, 0, 32, 64))), "prompt": PROMPT}
    *partials, last = client.images.edit(stream=True, partial_images=2, **said, extra_body={"steps": 3, "seed": 7})
    assert [event.type for event in partials] == ["image_edit.partial_image"] * 2
    assert last.type == "image_edit.completed" and opened(last.b64_json).size == (64, 64)


def test_models(client):
    assert [model.id for model in client.models.list()] == ["embedded"]
    assert client.models.retrieve("embedded").owned_by == "rolling-diffusion"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("dall-e-3")


@pytest.mark.parametrize(
    "said, param, words",
    [
        ({"n": 0}, "n", "at least 1"),
        ({"n": 11}, "n", "at most 10"),
        ({"n": "two"}, "n", "must be a whole number"),
        ({"size": "100x100"}, "size", "multiples of 16"),
        ({"size": "big"}, "size", "such as 1024x1024"),
        ({"size": "4096x4096"}, "size", "262,144 pixels"),
        ({"quality": "best"}, "quality", "auto, low"),
        ({"output_format": "gif"}, "output_format", "png, jpeg or webp"),
        ({"output_compression": 50}, "output_compression", "jpeg or webp"),
        ({"background": "transparent"}, "background", "auto or opaque"),
        ({"response_format": "url"}, "response_format", "writes no files"),
        ({"partial_images": 4, "stream": True}, "partial_images", "at most 3"),
        ({"partial_images": 2}, "partial_images", "set stream"),
        ({"extra_body": {"frames": 2}}, "frames", "set stream"),
        ({"partial_images": 2, "stream": True, "extra_body": {"frames": 2}}, "frames", "in place of partial_images"),
        ({"prompt": " "}, "prompt", "no words"),
        ({"prompt": "a" * 40_000}, "prompt", "32000"),
        ({"extra_body": {"style": "vivid"}}, "style", "Unknown parameter"),
        ({"extra_body": {"order": "sideways"}}, "order", "top-to-bottom"),
        ({"extra_body": {"steps": 1000}}, "steps", "at most 100"),
        ({"extra_body": {"seed": -1}}, "seed", "at least 0"),
        ({"extra_body": {"seed": 2**64 - 1}, "n": 2}, "seed", "no seeds"),
        ({"extra_body": {"lookahead": "far"}}, "lookahead", "auto or all"),
        ({"extra_body": {"lag": True}}, "lag", "autoregressive"),
        ({"extra_body": {"window": 4, "overlap": 6}}, "overlap", "below the window"),
        ({"extra_body": {"order": "raster", "window": 2, "overlap": 0, "steps": 100}}, "window", "calls of the model"),
    ],
)
def test_a_bad_request_is_told_in_a_sentence(client, said, param, words):
    with pytest.raises(openai.BadRequestError) as caught:
        client.images.generate(**{"prompt": PROMPT, **said})
    error = caught.value
    assert error.status_code == 400 and error.type == "invalid_request_error" and error.param == param
    assert words in error.body["message"] and error.response.text.count("\n") == 0
    assert error.body["message"].endswith(".")


def test_another_model_is_not_found(client):
    with pytest.raises(openai.NotFoundError) as caught:
        client.images.generate(model="gpt-image-1", prompt=PROMPT)
    assert caught.value.code == "model_not_found" and caught.value.param == "model"


@pytest.mark.parametrize(
    "said, param, words",
    [
        ({"image": ("a.png", b"no picture", "image/png")}, "image", "no PNG, JPEG or WebP"),
        ({"mask": ("a.png", b"\x89PNG\r\n\x1a\n", "image/png")}, "mask", "no PNG"),
        ({"mask": file_of(Image.new("RGBA", (32, 32)))}, "mask", "as large as"),
        ({"mask": file_of(Image.new("RGB", (64, 64)))}, "mask", "transparent"),
        ({"image": [file_of(scene()), file_of(scene())]}, "image", "twice"),
        ({"n": 11}, "n", "at most 10"),
        ({"extra_body": {"strength": 2}}, "strength", "at most 1"),
        ({"extra_body": {"strength": 0}}, "strength", "above 0"),
        ({"extra_body": {"steps": "many"}}, "steps", "whole number"),
    ],
)
def test_a_bad_edit_is_told_in_a_sentence(client, said, param, words):
    with pytest.raises(openai.BadRequestError) as caught:
        client.images.edit(**{"prompt": PROMPT, "image": file_of(scene()), **said})
    assert caught.value.param == param and words in caught.value.body["message"]


def test_places_that_are_not_there(server):
    for method, path, status in (("GET", "/v1/nothing", 404), ("GET", "/v1/images/generations", 405)):
        answer = httpx.request(method, server.url + path)
        assert answer.status_code == status and set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_health_and_metrics(server):
    health = server.get("/health").json()
    assert health == {"status": "ok", "model": "embedded", "drawing": 0, "waiting": 0, "queue": 32}
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused")
    before = [server.count(name) for name in ("pictures_total", "calls_total")]
    client.images.generate(prompt=PROMPT, size="32x32", extra_body={"steps": 2, "lag": 0})
    assert [server.count(name) for name in ("pictures_total", "calls_total")] == [before[0] + 1, before[1] + 2]
    assert (
        'rolling_diffusion_requests_total{route="/v1/images/generations",status="200"}' in server.get("/metrics").text
    )


def test_null_is_nothing_said(server):
    said = {"prompt": PROMPT, "size": "32x32", "steps": 1, "n": None, "user": "me", "moderation": "low", "window": None}
    answer = httpx.post(f"{server.url}/v1/images/generations", json=said, timeout=60)
    assert answer.status_code == 200 and len(answer.json()["data"]) == 1 and answer.headers["x-queue-place"] == "0"
    assert json.loads(answer.text.splitlines()[0]) == answer.json()
