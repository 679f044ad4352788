"""What comes in from outside: bad requests by the hundred, files that are none, names of paths, keys."""

import io
import json
import random
import struct
import zlib

import pytest
from PIL import Image

httpx = pytest.importorskip("httpx")
pytest.importorskip("fastapi")

from own_serve import Server, hosted  # noqa: E402

from rolling_diffusion.cli import main  # noqa: E402
from rolling_diffusion.serve import Studio, make_app  # noqa: E402
from rolling_diffusion.serve.fields import Generation  # noqa: E402
from rolling_diffusion.serve.guard import is_loopback  # noqa: E402

KEY = "sk-very-secret-4711"
GOOD = {"prompt": "a red ball", "size": "32x32", "steps": 1}


def png(width=32, height=32, mode="RGBA"):
    content = io.BytesIO()
    Image.new(mode, (width, height)).save(content, format="PNG")
    return content.getvalue()


def bomb(side=60_000):
    """A PNG of a few bytes that says it has 3.6 thousand million pixels."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", side, side, 8, 6, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 99)) + chunk(b"IEND", b"")


def odd_value(draw):
    return draw.choice(
        [-1, 10**400, 1e308, True, [], {}, [[]], "\x00", "9" * 300, "../../etc/passwd", "a" * 50_000, {"a": [None] * 9}]
    )


def bad_json(draw):
    """A body that is no good, in one of many ways."""
    name = draw.choice([name for name in Generation.model_fields if name not in ("user", "safety_identifier")])
    whole = json.dumps(GOOD).encode()
    return draw.choice(
        [
            lambda: whole[: draw.randrange(len(whole))],
            lambda: draw.randbytes(draw.randrange(200)),
            lambda: b"[" * draw.choice([10, 100_000]),
            lambda: b'{"prompt":' * 50_000,
            lambda: json.dumps(GOOD | {draw.choice(["path", "__class__", "image", "a" * 9000]): 1}).encode(),
            lambda: json.dumps({**GOOD, name: [odd_value(draw)]}).encode(),
            lambda: json.dumps(GOOD | {"prompt": "\ud800"}).encode(),
            lambda: json.dumps(GOOD | {"cfg": float("nan")}).encode(),
            lambda: b'{"prompt": "a", "n": ' + b"9" * 6000 + b"}",
            lambda: json.dumps(GOOD | {"n": odd_value(draw)}).encode(),
            lambda: json.dumps(odd_value(draw)).encode(),
        ]
    )()


def bad_picture(draw):
    """Files of a form of which at least one is no good."""
    whole = png(64, 64, draw.choice(["RGBA", "RGB", "L"]))
    cut = bytearray(whole)
    for _ in range(9):
        cut[draw.randrange(33)] = draw.randrange(256)
    file = draw.choice(
        [draw.randbytes(500), whole[: draw.randrange(40)], bytes(cut), bomb(), b"", b"GIF89a", b"<svg/>"]
    )
    return draw.choice([{"image": file}, {"image": png(64, 64), "mask": file}, {"image": file, "mask": png()}])


def is_refusal(answer):
    error = answer.json()["error"]
    assert 400 <= answer.status_code < 500, answer.text
    assert error.keys() == {"message", "type", "param", "code"} and answer.text.count("\n") == 0
    assert isinstance(error["message"], str) and len(answer.text) < 1000
    return True


def test_bad_requests_by_the_hundred(server):
    """Each is refused, memory stays where it is, and the server draws as before."""
    draw = random.Random(0)
    with httpx.Client(base_url=f"{server.url}/v1/images", timeout=30) as client:

        def fire(count):
            for _ in range(count):
                kind = {"content-type": draw.choice(["application/json"] * 5 + ["text/plain", "x", ""])}
                assert is_refusal(client.post("/generations", content=bad_json(draw), headers=kind))
                files = {name: ("a.png", content) for name, content in bad_picture(draw).items()}
                assert is_refusal(client.post("/edits", data={"prompt": "a"}, files=files))
                torn = b"--x\r\n" + draw.randbytes(draw.randrange(300))
                kind = {"content-type": draw.choice(["multipart/form-data; boundary=x", "multipart/form-data", "a/b"])}
                assert is_refusal(client.post("/edits", content=torn, headers=kind))

        fire(27)
        before = server.memory()
        fire(140)  # with those before, 501
        assert server.memory() < 1.02 * before
        assert client.post("/generations", json=GOOD).status_code == 200
    assert server.idle()


@pytest.mark.parametrize("name", ["image", "mask"])
def test_no_path_of_a_request_is_opened(server, name, tmp_path):
    """What looks like the name of a file is no file."""
    there = tmp_path / "there.png"
    there.write_bytes(png())
    url = f"{server.url}/v1/images/edits"
    for path in (str(there), f"file://{there}", "http://127.0.0.1:1/a.png"):
        files = {"image": ("a.png", png())} if name == "mask" else {"other": ("a.png", png())}
        answer = httpx.post(url, data={"prompt": "a", name: path}, files=files)
        assert is_refusal(answer) and answer.json()["error"]["param"] in (name, "other")
    answer = httpx.post(url, data={"prompt": "a"}, files={"image": (str(there), b"no picture")})
    assert is_refusal(answer) and "no PNG" in answer.json()["error"]["message"]
    for path in (
        "/pictures/..%2f..%2fetc%2fpasswd",
        "/pictures/page.html",
        "/page/page.html",
        "/%2e%2e/pyproject.toml",
    ):
        assert httpx.get(server.url + path).status_code == 404


def test_uploads_are_bounded_before_they_are_decoded(server):
    url = f"{server.url}/v1/images/edits"
    answer = httpx.post(url, data={"prompt": "a"}, files={"image": ("a.png", bomb())})
    assert is_refusal(answer) and "more than 16,777,216 pixels" in answer.json()["error"]["message"]
    answer = httpx.post(url, data={"prompt": "a"}, files={"image": ("a.png", bytes(21 * 2**20))})
    assert answer.status_code == 413 and is_refusal(answer)
    answer = httpx.post(f"{server.url}/v1/images/generations", json=GOOD | {"user": "a" * 2**20})
    assert answer.status_code == 413 and is_refusal(answer)

    def chunks():
        for _ in range(40):
            yield bytes(2**16)

    kind = {"content-type": "application/json"}
    answer = httpx.post(f"{server.url}/v1/images/generations", content=chunks(), headers=kind)  # of no announced length
    assert answer.status_code == 413 and is_refusal(answer)


def test_nothing_is_written_unless_asked(server):
    """Neither pictures, nor uploads, not even those of megabytes."""
    noise = Image.effect_noise((1500, 1500), 90)
    content, small = io.BytesIO(), io.BytesIO()
    noise.save(content, format="PNG")
    noise.resize((32, 32)).save(small, format="PNG")
    assert len(content.getvalue()) > 2**20
    said = {"prompt": "a", "size": "32x32", "steps": "1"}
    for files in ({"image": small.getvalue()}, {"image": content.getvalue()}):
        before = server.written()  # after the first picture: libraries leave files of their own as they are loaded
        answer = httpx.post(f"{server.url}/v1/images/edits", data=said, files=files, timeout=60)
        assert answer.status_code == 200
    assert server.written() == before


def test_pictures_by_url_where_a_folder_was_named(rolled, tmp_path):
    with hosted(make_app(Studio(rolled, "embedded"), folder=tmp_path)) as url:
        answer = httpx.post(f"{url}/v1/images/generations", json=GOOD | {"response_format": "url"}, timeout=60).json()
        picture = httpx.get(answer["data"][0]["url"])
        assert picture.headers["content-type"] == "image/png"
        assert Image.open(io.BytesIO(picture.content)).size == (32, 32)
        assert [path.read_bytes() for path in tmp_path.iterdir()] == [picture.content]
        streamed = httpx.post(f"{url}/v1/images/generations", json=GOOD | {"response_format": "url", "stream": True})
        assert is_refusal(streamed)


def test_edits_are_refused_where_parts_wait_elsewhere(rolled):
    with hosted(make_app(Studio(rolled, "embedded", offloaded=True))) as url:
        answer = httpx.post(f"{url}/v1/images/edits", data={"prompt": "a"}, files={"image": png()})
        assert is_refusal(answer) and "started with offloading" in answer.json()["error"]["message"]


def test_pages_from_elsewhere_may_not_ask(server):
    url = f"{server.url}/v1/images/generations"
    for headers in ({"origin": "https://example.com"}, {"host": "example.com"}, {"origin": "null"}, {"host": "["}):
        answer = httpx.post(url, json=GOOD, headers=headers)
        assert answer.status_code == 403 and is_refusal(answer)
    assert httpx.post(url, json=GOOD, headers={"origin": server.url}, timeout=60).status_code == 200


def test_a_key_is_asked_for_and_in_no_log(tmp_path):
    openai = pytest.importorskip("openai")
    server = Server(tmp_path, "--api-key", KEY, "--device", "cpu", "--host", "0.0.0.0")
    try:
        url = server.url.replace("0.0.0.0", "127.0.0.1")
        with pytest.raises(openai.AuthenticationError) as caught:
            openai.OpenAI(base_url=f"{url}/v1", api_key=f"{KEY}x", max_retries=0).models.list()
        assert caught.value.code == "invalid_api_key" and KEY not in caught.value.response.text
        for path in ("/v1/models", "/metrics", "/v1/nothing"):
            assert is_refusal(httpx.get(url + path)) and httpx.get(url + path).status_code == 401
        assert httpx.get(f"{url}/health").status_code == httpx.get(url).status_code == 200
        client = openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0)
        assert client.images.generate(prompt="a secret prompt", size="32x32", extra_body={"steps": 1}).data
        httpx.get(f"{url}/v1/models?api_key={KEY}", headers={"authorization": f"Bearer {KEY}"})
        upload = httpx.post(f"{url}/v1/images/edits", files={"image": bytes(2**21)})  # refused while it is being sent
        assert upload.status_code == 401
    finally:
        server.stop()
    assert server.process.returncode in (0, -15, 130) and "GET /v1/models 200" in server.said()
    assert KEY not in server.said() and "secret prompt" not in server.said()


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--host", "0.0.0.0"], "--host 0.0.0.0 is open to others: give an --api-key"),
        (["--host", "example.com"], "is open to others"),
        (["--host", "::"], "is open to others"),
        (["--api-key", " "], "the key is empty"),
        (["--output", "nowhere"], "there is no such folder"),
        (["--model", "nowhere"], "no such folder or file"),
        (["--port", "70000"], "from 0 to 65535"),
    ],
)
def test_what_the_program_refuses(capsys, monkeypatch, tmp_path, argv, words):
    monkeypatch.delenv("ROLLING_DIFFUSION_API_KEY", raising=False)
    monkeypatch.chdir(tmp_path)
    code = main(["serve", *argv])
    error = capsys.readouterr().err
    assert code == 2 and words in error and error.count("\n") == 1


def test_a_port_that_is_taken_is_said_so(server, capsys):
    port = server.url.rpartition(":")[2]
    assert main(["serve", "--port", port]) == 2
    assert f"cannot listen on 127.0.0.1 port {port}" in capsys.readouterr().err


def test_a_key_is_one_without_the_blanks_around_it(monkeypatch):
    given = []
    monkeypatch.setattr("rolling_diffusion.cli.serve.application", lambda values, key, folder: given.append(key))
    monkeypatch.setattr("uvicorn.Server.run", lambda self, sockets: None)
    monkeypatch.setenv("ROLLING_DIFFUSION_API_KEY", "a-key\n")
    assert main(["serve", "--port", "0"]) == 0 and given == ["a-key"]


def test_every_name_of_this_machine_is_served_without_a_key(rolled):
    with hosted(make_app(Studio(rolled, "embedded"))) as url:
        for host, status in {"127.0.0.2": 200, "localhost": 200, "[::1]": 200, "10.0.0.1": 403, "e.com": 403}.items():
            assert httpx.get(f"{url}/v1/models", headers={"host": host}).status_code == status, host


def test_a_picture_that_cannot_be_written_is_carried(rolled, tmp_path, monkeypatch):
    from pathlib import Path

    def full(path, content):
        raise OSError(28, "No space left on device")

    with hosted(make_app(Studio(rolled, "embedded"), folder=tmp_path)) as url:
        monkeypatch.setattr(Path, "write_bytes", full)
        said = {"prompt": "a red ball", "size": "32x32", "steps": 1, "response_format": "url"}
        answer = httpx.post(f"{url}/v1/images/generations", json=said, timeout=60).json()
    assert set(answer["data"][0]) == {"b64_json", "seed"} and not list(tmp_path.iterdir())


def test_loopback():
    assert all(map(is_loopback, ("localhost", "127.0.0.1", "127.8.8.8", "::1")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "192.168.0.1", "example.com", "")))
