"""`rolling-diffusion serve --replicas 2`: two models on Ray Serve, asked by OpenAI's client, under the same rules."""

import base64
import importlib.util
import io
import tempfile
from contextlib import ExitStack

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

openai = pytest.importorskip("openai")
httpx = pytest.importorskip("httpx")
pytest.importorskip("fastapi")
# Not imported: Ray reads its settings as it is, and a test of this process sets others.
if not all(map(importlib.util.find_spec, ("ray", "grpc", "aiohttp"))):
    pytest.skip("needs Ray Serve", allow_module_level=True)

from own_serve import Server  # noqa: E402

from rolling_diffusion.cli import main  # noqa: E402

KEY = "sk-very-secret-4711"
PROMPT = "a red ball above a blue boat"
LONG = {"prompt": PROMPT, "size": "256x256", "steps": 100, "stream": True}
BEARER = {"authorization": f"Bearer {KEY}"}


@pytest.fixture(scope="module")
def replicas(tmp_path_factory):
    folder = tmp_path_factory.mktemp("replicas")
    (folder / "pictures").mkdir()
    words = ("--replicas", "2", "--device", "cpu", "--output", str(folder / "pictures"))
    with (
        pytest.MonkeyPatch.context() as patch,
        tempfile.TemporaryDirectory(dir="/tmp") as short,
    ):  # of its sockets' names
        for name, value in {"RAY_TMPDIR": short, "RAY_worker_niceness": "0", "OMP_NUM_THREADS": "1"}.items():
            patch.setenv(name, value)
        patch.setenv("ROLLING_DIFFUSION_API_KEY", KEY)
        started = Server(folder, *words)
        try:
            yield started
        finally:
            family = psutil.Process(started.process.pid).children(recursive=True)
            started.stop()
        assert started.process.returncode == 0
        _, left = psutil.wait_procs(family, timeout=60)
        assert not left
        said = started.said()
        assert "POST /v1/images/generations 200" in said and KEY not in said and PROMPT not in said


@pytest.fixture()
def client(replicas):
    with openai.OpenAI(base_url=f"{replicas.url}/v1", api_key=KEY, max_retries=0, timeout=120) as client:
        yield client


def pixels(b64_json):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(b64_json))).convert("RGB")).astype(int)


def test_openais_client_generates_streams_and_edits(client, rolled):
    said = {"prompt": PROMPT, "size": "64x64", "extra_body": {"steps": 3, "seed": 7}}
    options = {"width": 64, "height": 64, "num_inference_steps": 3, "generator": torch.Generator().manual_seed(7)}
    own = np.asarray(rolled(PROMPT, **options).images[0]).astype(int)
    for _ in range(4):  # whichever replica draws
        assert np.array_equal(pixels(client.images.generate(**said).data[0].b64_json), own)
    *partials, last = client.images.generate(stream=True, partial_images=2, **said)
    assert [event.type for event in partials] == ["image_generation.partial_image"] * 2
    assert np.array_equal(pixels(last.b64_json), own)
    start = io.BytesIO()
    Image.new("RGB", (64, 64), (60, 120, 200)).save(start, format="PNG")
    edited = client.images.edit(image=("a.png", start.getvalue()), prompt=PROMPT, extra_body={"steps": 2})
    assert pixels(edited.data[0].b64_json).shape == (64, 64, 3)
    with pytest.raises(openai.BadRequestError, match="multiples of 16"):
        client.images.generate(prompt=PROMPT, size="100x100")


def test_two_are_drawn_at_a_time_and_a_closed_stream_ends(replicas):
    url = f"{replicas.url}/v1/images/generations"
    with ExitStack() as both:
        streams = [
            both.enter_context(httpx.stream("POST", url, json=LONG, headers=BEARER, timeout=120)) for _ in (1, 2)
        ]
        lines = [stream.iter_lines() for stream in streams]
        for each in lines:
            assert any(line.startswith(": call 2") for line in each)
        del each
    replicas.until(lambda: all(replicas.idle() for _ in range(20)))  # whichever is asked; the pictures take minutes


def test_a_picture_by_url_comes_from_either(replicas, client):
    link = (
        client.images.generate(prompt=PROMPT, size="32x32", response_format="url", extra_body={"steps": 1}).data[0].url
    )
    files = {httpx.get(link, headers=BEARER).content for _ in range(8)}
    assert len(files) == 1 and Image.open(io.BytesIO(files.pop())).size == (32, 32)
    for name in ("0" * 32 + ".png", "*.png", "..%2f..%2fetc%2fpasswd"):
        assert httpx.get(f"{replicas.url}/pictures/{name}", headers=BEARER).status_code == 404


def test_who_may_ask_is_asked_as_ever(replicas):
    wrong = openai.OpenAI(base_url=f"{replicas.url}/v1", api_key=f"{KEY}x", max_retries=0)
    with pytest.raises(openai.AuthenticationError):
        wrong.models.list()
    assert httpx.get(f"{replicas.url}/metrics").status_code == 401
    assert httpx.get(f"{replicas.url}/v1/models", headers=BEARER | {"origin": "https://example.com"}).status_code == 403
    upload = httpx.post(f"{replicas.url}/v1/images/edits", files={"image": bytes(2**22)}, headers=BEARER)
    assert upload.status_code == 400
    own = {process.pid for process in family(replicas)}
    ports = {c.laddr.ip for c in psutil.net_connections("inet") if c.status == "LISTEN" and c.pid in own}
    assert {ip.removeprefix("::ffff:") for ip in ports} == {"127.0.0.1"}


def family(server):
    return psutil.Process(server.process.pid).children(recursive=True)


def test_a_replica_that_dies_is_replaced(replicas, client):
    victim = next(one for one in family(replicas) if one.name().startswith("ray::ServeReplica"))
    victim.kill()
    replicas.until(lambda: sum(one.name().startswith("ray::ServeReplica") for one in family(replicas)) == 2, 300)
    assert client.images.generate(prompt=PROMPT, size="32x32", extra_body={"steps": 1}).data


def test_a_model_that_cannot_be_loaded_is_one_sentence(tmp_path, monkeypatch):
    with tempfile.TemporaryDirectory(dir="/tmp") as short, pytest.raises(RuntimeError) as told:
        monkeypatch.setenv("RAY_TMPDIR", short)
        Server(tmp_path, "--replicas", "1", "--device", "cpu", "--lora", "nowhere.safetensors")
    sentence = "rolling-diffusion: the replicas cannot start: there is no LoRA file nowhere.safetensors"
    assert str(told.value).splitlines()[-1] == sentence


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--device", "cuda:1"], "--device cuda:1"),
        (["--host", "0.0.0.0"], "--host 0.0.0.0 is open to others"),
    ],
)
def test_what_is_refused(capsys, monkeypatch, argv, words):
    monkeypatch.delenv("ROLLING_DIFFUSION_API_KEY", raising=False)
    assert main(["serve", "--port", "0", "--replicas", "2", *argv]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1
