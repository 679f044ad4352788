"""`generate --from`: what was said is said again, what was fitted is fitted anew, and the machine is this one."""

import json
from argparse import Namespace

import pytest
from PIL import Image, PngImagePlugin

from rolling_diffusion.cli import generate
from rolling_diffusion.cli.files import KEY, read_record, save_png
from rolling_diffusion.cli.main import make_parser
from rolling_diffusion.cli.replay import record

PIXEL = Image.new("RGB", (8, 8))
# As version 0.1.0 recorded "a blue boat" with nothing else said, on a machine with a GPU.
OLD = {
    "width": 256, "height": 256, "steps": 20, "order": "top-to-bottom", "draft": 10, "lookahead": "all", "lag": None,
    "persistence": 1.0, "seed": 3, "prompt": "a blue boat", "negative_prompt": "", "cfg": 2.5, "sampler": "euler",
    "scheduler": "simple", "model": "embedded", "device": "cuda", "dtype": "bfloat16", "cpu_offload": "model",
    "lora": None, "quantize": None, "window": 16, "overlap": 8, "version": "0.1.0",
}  # fmt: skip


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def parsed(*argv: str) -> Namespace:
    return make_parser().strict(["generate", *argv])


def job(*argv: str) -> generate.Job:
    return generate.prepare(parsed(*argv))


def made(*argv: str, file: str = "boat.png") -> str:
    """A picture as `generate` with these words records it, but for the picture itself."""
    one = job(*argv)
    save_png(generate.Path(file), PIXEL, record(one.said, one.settings))
    return file


def old(file: str = "boat.png", **changes) -> str:
    info = PngImagePlugin.PngInfo()
    info.add_itxt(KEY, json.dumps(OLD | changes))
    PIXEL.copy().save(file, pnginfo=info)
    return file


@pytest.mark.parametrize("picture", [lambda: made("a blue boat", "--seed", "3"), old], ids=["new", "old"])
def test_what_was_fitted_is_fitted_again(picture):
    file = picture()
    assert job("--from", file).settings["draft"] == 10
    for steps in (8, 40):
        again = job("--from", file, "--steps", str(steps)).settings
        assert (again["steps"], again["draft"], again["seed"]) == (steps, steps // 2, 3)
    again = job("--from", file, "--height", "2048").settings
    assert (again["window"], again["overlap"], again["lookahead"]) == (128, 64, 128)
    assert job("--from", file, "--window", "24").settings["overlap"] == 12


def test_what_was_said_is_said_again(here):
    said = ["--order", "spiral-out", "--window", "12", "--draft", "3", "--lag", "autoregressive", "--cfg", "2"]
    said += ["--lookahead", "all", "--persistence", "0.5", "--negative-prompt", "-red", "--sampler", "lcm"]
    file = made("a blue boat", *said)
    kept = read_record(here / file)
    assert kept["said"].keys() == {
        *("prompt", "seed", "order", "window", "draft", "lag", "cfg"),
        *("lookahead", "persistence", "negative_prompt", "sampler"),
    }
    first, again = job("a blue boat", *said), job("--from", file, "--steps", "10")
    for name, value in kept["said"].items():
        assert first.settings[name] == again.settings[name] == value
    made("--from", file, "--seed", "9", file="second.png")
    assert read_record(here / "second.png")["said"] == kept["said"] | {"seed": 9}
    assert job("--from", file, "--width", "512").settings["window"] == 12


def test_an_old_picture_made_anew_is_the_same():
    first, again = job("a blue boat", "--seed", "3").settings, job("--from", old()).settings
    assert {**first, "cfg": 2.5} == again  # which the model's card says


def test_a_default_that_has_changed_since_is_told(here):
    file = made("a blue boat", "--device", "cpu")
    kept = read_record(here / file)

    def told(*argv: str) -> list[str]:
        one = job("--from", file, *argv)
        return list(generate.notes(parsed("--from", file, *argv), one, one.settings))

    assert told() == []
    save_png(here / file, PIXEL.copy(), kept | {"fitted": kept["fitted"] | {"draft": 5}})
    assert (
        told()
        == told("--seed", "4")
        == ["boat.png was made with draft 5, and is now made with 10, as the default has changed"]
    )
    assert told("--steps", "8") == []


@pytest.mark.parametrize("picture", ["new", "old"])
def test_device_dtype_and_offload_are_the_machine_s(here, picture):
    made("a blue boat", "--dtype", "float32", "--device", "cpu")
    if picture == "old":
        old()
    else:
        kept = read_record(here / "boat.png")
        assert kept["machine"] == {"device": "cpu", "dtype": "float32", "cpu_offload": None}
        save_png(here / "boat.png", PIXEL.copy(), kept | {"machine": {"device": "cuda", "cpu_offload": "model"}})
    again = job("--from", "boat.png").settings
    assert (again["dtype"], again["cpu_offload"]) == ("auto", None)
    assert job("--from", "boat.png", "--device", "cpu").settings["device"] == "cpu"


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"steps": "many"}, ["records steps = 'many'", "--steps must be a whole number"]),
        ({"seed": -1}, ["records seed = -1", "--seed must be"]),
        ({"seed": 2.5}, ["--seed must be"]),
        ({"seed": 2**64}, ["--seed must be a whole number from 0 to 18446744073709551615"]),
        ({"width": [256]}, ["--width must be"]),
        ({"persistence": "much"}, ["--persistence must be a number from 0 to 1"]),
        ({"prompt": 7}, ["records prompt = 7", "must be a text"]),
        ({"negative_prompt": {}}, ["--negative-prompt must be a text"]),
        ({"model": True}, ["--model must be a text"]),
        ({"order": "sprial-out"}, ["--order knows no 'sprial-out' (did you mean 'spiral-out'?)"]),
        ({"lora": 7}, ["--lora takes names and strengths"]),
        ({"lora": [["x", "strong"]]}, ["--lora takes names and strengths"]),
        ({"model": "/home/somebody/flux.safetensors"}, ["--model must name a file that is here", "say it anew"]),
    ],
)
def test_a_recorded_value_of_the_wrong_kind_is_one_sentence(changes, words):
    file = old(**changes)
    with pytest.raises(ValueError) as caught:
        job("--from", file)
    assert all(word in str(caught.value) for word in [f"{file} cannot be used again", *words]), caught.value
    named = "_".join(changes)
    if named not in ("model", "prompt", "lora"):
        return
    job("--from", file, *{"model": ["--model", "embedded"], "prompt": ["a"], "lora": ["--lora", "a/b"]}[named])


def test_a_picture_names_files_without_their_folders(here):
    for name in ("home/me/models/style.safetensors", "home/me/photo.png", "beside/style.safetensors"):
        (here / name).parent.mkdir(parents=True, exist_ok=True)
        PIXEL.resize((64, 32)).save(here / name, format="PNG")
    said = ["--lora", f"{here}/home/me/models/style.safetensors=0.5", "--lora", "some/hub"]
    made("a blue boat", *said, "--image", "home/me/photo.png", file="beside/boat.png")
    text = (here / "beside" / "boat.png").read_bytes()
    assert b"home" not in text and str(here).encode() not in text
    kept = read_record(here / "beside" / "boat.png")["said"]
    assert kept["lora"] == [["style.safetensors", 0.5], ["some/hub", 1.0]] and kept["image"] == "photo.png"
    with pytest.raises(ValueError, match=r"records image = 'photo\.png', and --image must name a file that is here"):
        job("--from", "beside/boat.png")
    (here / "photo.png").symlink_to("home/me/photo.png")
    again = job("--from", "beside/boat.png").settings
    assert again["lora"] == [("beside/style.safetensors", 0.5), ("some/hub", 1.0)]
    assert (again["width"], again["height"]) == (64, 32)


def test_a_model_is_recorded_by_its_name_and_found_again_beside_the_picture(here):
    (here / "models" / "mine").mkdir(parents=True)
    (here / "models" / "mine" / "model_index.json").write_text("{}")
    made("a boat", "--model", f"{here}/models/mine", file="models/boat.png")
    assert read_record(here / "models" / "boat.png")["said"]["model"] == "mine"
    assert job("--from", "models/boat.png").folder == "models/mine"
