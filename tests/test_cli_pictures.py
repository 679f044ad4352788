"""`generate`, `evaluate` and `train` with a real model: the embedded one's parts, untrained."""

import io
import json
import shutil
import sys

import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence

from rolling_diffusion.appearing import PAPER, unveiled
from rolling_diffusion.cli import animation, generate, main
from rolling_diffusion.cli.files import read_record
from rolling_diffusion.cli.main import make_parser
from rolling_diffusion.cli.model import load, locate
from rolling_diffusion.core.plan import make_plan
from rolling_diffusion.world.render import render
from rolling_diffusion.world.scene import random_scene

TINY = ("--width", "64", "--height", "64", "--steps", "3", "--device", "cpu")
PROMPT = "a red house left of a blue boat"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model folder as training writes it."""
    from rolling_diffusion.train.diffusion import new_transformer
    from rolling_diffusion.train.export import export
    from rolling_diffusion.train.text import new_encoders
    from rolling_diffusion.train.vae import new_vae, pictures

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model") / "tiny"
    vae = new_vae(pictures(np.random.default_rng(0), 12))
    transformer = new_transformer(0)
    with torch.no_grad():  # nothing at its initial 0, or no input would matter
        for parameter in transformer.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    export(folder, transformer, *new_encoders(), vae, rolling=True)
    return str(folder)


@pytest.fixture()
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def pixels(file) -> np.ndarray:
    with Image.open(file) as image:
        return np.asarray(image.convert("RGB"))


def test_a_picture_can_be_made_again_from_itself(here, model, capsys):
    said = ("--order", "spiral-out", "--seed", "5", "--persistence", "0.5", "--sampler", "dpmpp_2m", "--cfg", "2")
    assert main(["generate", PROMPT, *TINY, *said, "--model", model, "-o", "one.png"]) == 0
    assert main(["generate", "--from", "one.png", "--model", model, "-o", "two.png"]) == 0
    assert pixels("one.png").shape == (64, 64, 3) and pixels("one.png").std() > 0
    assert np.array_equal(pixels("one.png"), pixels("two.png"))
    assert read_record("one.png") == read_record("two.png")
    assert main(["generate", "--from", "one.png", "--model", model, "--seed", "6", "-o", "three.png"]) == 0
    assert not np.array_equal(pixels("one.png"), pixels("three.png"))
    assert sorted(f.name for f in here.iterdir()) == ["one.png", "three.png", "two.png"]
    assert capsys.readouterr().out.split() == ["one.png", "two.png", "three.png"]


def test_prompts_of_parts_are_the_librarys_and_are_said_again(here, model, capsys):
    parts = [[0, "a red house"], [0.5, "a blue boat"], [[0, 32, 32, 64], "a red ball"]]
    (here / "parts.json").write_text(json.dumps(parts))
    (here / "lines.txt").write_text("a red house\n\na blue boat\n")
    (here / "half.json").write_text(json.dumps(parts[:2]))
    for name in ("parts.json", "lines.txt", "half.json"):
        assert main(["generate", "--prompts", name, *TINY, "--model", model, "-o", f"{name}.png"]) == 0
    assert np.array_equal(pixels("lines.txt.png"), pixels("half.json.png"))
    pipe = load(model, "cpu", "auto")
    said = [(tuple(place) if isinstance(place, list) else place, prompt) for place, prompt in parts]
    how = {"width": 64, "height": 64, "num_inference_steps": 3, "generator": torch.Generator().manual_seed(0)}
    image = pipe(said, **how).images[0]
    assert np.abs(np.asarray(image).astype(int) - pixels("parts.json.png")).max() <= 1
    assert main(["generate", "--from", "parts.json.png", "--model", model, "-o", "again.png"]) == 0
    assert np.array_equal(pixels("again.png"), pixels("parts.json.png"))
    assert main(["generate", "a red ball", "--from", "parts.json.png", "--model", model, "-o", "one.png"]) == 0
    assert "prompts" not in read_record("one.png")["said"]


def test_every_setting_is_in_the_picture_and_resolved(here, model):
    main(["generate", PROMPT, *TINY, "--model", model, "-o", "one.png"])
    kept = read_record("one.png")
    assert kept["said"] == {"prompt": PROMPT, "width": 64, "height": 64, "steps": 3, "seed": 0, "model": "tiny"}
    assert kept["fitted"].keys() | kept["said"].keys() | kept["machine"].keys() == {*generate.SETTINGS}
    assert kept["machine"] == {"device": "cpu", "dtype": "float32", "cpu_offload": None}
    assert kept["fitted"]["cfg"] == 2.5 and kept["fitted"]["window"] == 4


def test_each_picture_of_a_batch_can_be_made_alone(here, model):
    main(["generate", PROMPT, *TINY, "--seed", "8", "--batch", "2", "--model", model])
    name = "a-red-house-left-of-a-blue-boat"
    assert sorted(f.name for f in here.iterdir()) == [f"{name}-8.png", f"{name}-9.png"]
    main(["generate", PROMPT, *TINY, "--seed", "9", "--model", model, "-o", "alone.png"])
    assert np.array_equal(pixels(f"{name}-9.png"), pixels("alone.png"))
    assert not np.array_equal(pixels(f"{name}-8.png"), pixels("alone.png"))


def test_a_second_run_leaves_the_picture_of_the_first(here, model, capsys):
    for order in ("raster", "spiral-out"):
        assert main(["generate", "a red ball", *TINY, "--order", order, "--model", model]) == 0
    assert capsys.readouterr().out.split() == ["a-red-ball-0.png", "a-red-ball-0-2.png"]
    assert read_record("a-red-ball-0.png")["said"]["order"] == "raster"
    assert read_record("a-red-ball-0-2.png")["said"]["order"] == "spiral-out"


def test_a_batch_goes_on_where_the_terminal_cannot_show_its_names(here, model, monkeypatch):
    screen = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    monkeypatch.setattr(sys, "stdout", screen)
    assert main(["generate", "красный шар", *TINY, "--batch", "2", "--model", model]) == 0
    assert sorted(f.name for f in here.iterdir()) == ["красный-шар-0.png", "красный-шар-1.png"]
    assert screen.buffer.getvalue().splitlines()[1].endswith(b"-1.png")


def test_a_picture_is_not_lost_where_its_folder_goes_while_it_is_drawn(here, model, monkeypatch, capsys):
    (here / "out").mkdir()
    (here / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(here / "tmp"))
    real = generate.draw

    def draw(*call):
        (here / "out").rmdir()
        return real(*call)

    monkeypatch.setattr(generate, "draw", draw)
    assert main(["generate", PROMPT, *TINY, "--model", model, "-o", "out/one.png"]) == 1
    error = capsys.readouterr().err
    assert error == (
        "rolling-diffusion: cannot write out/one.png: No such file or directory; "
        f"it is kept at {here / 'tmp' / 'one.png'}\n"
    )
    assert pixels(here / "tmp" / "one.png").shape == (64, 64, 3)


def test_the_animation_grows_in_order_and_ends_in_the_picture(here, model):
    files = ("-o", "one.png", "--animation", "one.webp", "--report", "one.json")
    apart = ("--lag", "autoregressive", "--draft", "0")
    assert main(["generate", PROMPT, *TINY, *apart, "--model", model, *files]) == 0
    with Image.open("one.webp") as image:
        frames = [np.asarray(frame.convert("RGB")).astype(int) for frame in ImageSequence.Iterator(image)]
    assert np.abs(frames[-1] - pixels("one.png")).mean() < 8  # WebP is lossy
    first, last = frames[0], frames[-1]
    assert np.abs(frames[len(frames) // 2][:16] - last[:16]).mean() < np.abs(first[:16] - last[:16]).mean()
    report = json.loads((here / "one.json").read_text())
    plan = make_plan(8, 8, 3, window=4, overlap=2, lag="autoregressive")
    assert report["cost"]["ticks"] == plan.ticks and report["plan"]["lag"] == 3
    assert report["pictures"][0]["file"] == "one.png" and report["pictures"][0]["seconds"] > 0
    assert report["settings"]["prompt"] == PROMPT


def test_a_picture_in_an_order_decided_late_is_made_again(here, model):
    late = ("--order", "difficulty", "--draft", "2", "--steps", "4", "--extrapolation", "0.4", "--animation", "a.gif")
    assert main(["generate", PROMPT, *TINY, *late, "--model", model, "-o", "one.png"]) == 0
    assert main(["generate", "--from", "one.png", "--model", model, "-o", "two.png", "--device", "cpu"]) == 0
    assert np.array_equal(pixels("one.png"), pixels("two.png"))
    records = [read_record(file)["said"] for file in ("one.png", "two.png")]
    assert records[0] == records[1] and records[0]["order"] == "difficulty" and records[0]["extrapolation"] == 0.4


def test_the_animation_shows_a_block_as_far_as_its_noise_lets_it_show():
    plan = make_plan(32, 8, 4, window=16, overlap=8)  # four strips of 64×64 pixels
    checks = np.kron(np.indices((64, 16)).sum(0) % 2, np.ones((4, 4)))[..., None] * np.full(3, 255)
    image = Image.fromarray(checks.astype(np.uint8))
    done, some, much, _ = plan.blocks
    seen = np.asarray(unveiled(image, plan, {done: 0.0, some: 0.2, much: 0.8})).astype(float)
    assert np.array_equal(seen[:32], checks[:32])  # finished: as it is, but for the soft edge of its successor
    contrast = [seen[64 * i + 24 : 64 * i + 40, 16:48].std() for i in range(4)]
    assert contrast[0] > 2 * contrast[1] > 4 * contrast[2] and contrast[2] < 3
    assert abs(seen[144:176].mean() - 127.5) < 3  # blurred, not dimmed
    assert (seen[192:] == PAPER).all()


def test_a_block_that_came_and_went_between_two_kept_frames_is_not_left_blank(here, model, monkeypatch):
    kept = []
    monkeypatch.setattr(animation, "MOST_FRAMES", 2)
    monkeypatch.setattr(generate, "save_animation", lambda path, frames: kept.extend(frames) or path)
    apart = ("--lag", "autoregressive", "--draft", "0", "--animation", "one.gif")
    assert main(["generate", PROMPT, *TINY, *apart, "--model", model, "-o", "one.png"]) == 0
    second, third, last = np.split(np.asarray(kept[1])[16:], 3)  # at tick 6 of 12: two strips done, the third begun
    assert not (second == PAPER).all(-1).any() and not (third == PAPER).all(-1).all()
    assert (last == PAPER).all()


def test_heun_s_plan_counts_its_ticks(here, model):
    files = ("-o", "one.png", "--report", "one.json")
    assert main(["generate", PROMPT, *TINY, "--sampler", "heun", "--model", model, *files]) == 0
    assert json.loads((here / "one.json").read_text())["plan"]["steps"] == 5


def test_the_progress_bar_names_the_block(here, model, monkeypatch):
    screen = io.StringIO()
    screen.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", screen)
    main(["generate", PROMPT, *TINY, "--model", model, "-o", "one.png"])
    assert "block 1 of 4" in screen.getvalue() and "block 4 of 4" in screen.getvalue()


def test_unknown_words_are_warned_of_with_those_that_are_known(here, model, capsys):
    assert main(["generate", "a Zebra on a red boat", *TINY, "--model", model, "-o", "one.png"]) == 0
    first, second = capsys.readouterr().err.splitlines()
    assert "does not know 'zebra'." in first
    assert {"red", "boat", "kite"} <= set(second.split())
    main(["generate", PROMPT, *TINY, "--model", model, "-o", "one.png"])
    assert capsys.readouterr().err == ""


def test_words_that_the_model_makes_nothing_of_are_named(here, model, capsys):
    assert main(["generate", "a red boat, 3 🎈 «шар» 7 — ボール.", *TINY, "--model", model, "-o", "one.png"]) == 0
    assert "does not know '🎈', 'шар', '7', 'ボール'." in capsys.readouterr().err


def test_what_is_cut_off_a_prompt_is_named(here, model, capsys):
    long = "a red house " * 10 + "and a blue boat, and a green tree at night"
    assert main(["generate", long, *TINY, "--negative-prompt", "a kite", "--model", model, "-o", "one.png"]) == 0
    error = capsys.readouterr().err
    assert error == (
        "warning: this model reads 32 tokens of a prompt, and not its end: 'a blue boat, and a green tree at night'\n"
    )
    assert main(["generate", PROMPT, *TINY, "--model", model, "-o", "two.png"]) == 0
    assert capsys.readouterr().err == ""


def test_a_picture_to_start_from_is_kept_as_far_as_strength_and_mask_say(here, capsys):
    photo = render(random_scene(np.random.default_rng(0), 128, 128))
    Image.fromarray(photo).save("photo.png")
    Image.fromarray(np.repeat(np.uint8([[0], [255]]), 64, 0).repeat(128, 1)).save("mask.png")
    start = ("--image", "photo.png", "--device", "cpu", "--steps", "6")
    for name, more in {
        "weak": ("--strength", "0.2"),
        "strong": ("--strength", "0.95"),
        "masked": ("--mask", "mask.png", "--strength", "0.95"),
    }.items():
        assert main(["generate", PROMPT, *start, *more, "-o", f"{name}.png"]) == 0
    found = {name: pixels(f"{name}.png").astype(float) for name in ("weak", "strong", "masked")}
    error = {name: np.abs(image - photo).mean() for name, image in found.items()}
    assert error["weak"] < 0.5 * error["strong"], error
    halves = [np.abs(found["masked"] - photo)[rows].mean() for rows in (slice(0, 56), slice(72, 128))]
    assert halves[0] < 0.5 * halves[1], halves
    again = (*start[2:], "-o", "again.png")
    assert main(["generate", "--from", "masked.png", *again]) == 0
    assert np.array_equal(pixels("again.png"), pixels("masked.png"))
    assert capsys.readouterr().err == ""


def test_what_a_pipeline_does_not_take_is_named(here):
    class Textless:
        parameters = ("prompt",)
        pipe = None

    Image.new("RGB", (64, 64)).save("photo.png")
    job = generate.prepare(make_parser().strict(["generate", "a boat", "--negative-prompt", "ugly"]))
    with pytest.raises(ValueError, match="--negative-prompt is not for NoneType, which takes no negative_prompt"):
        generate.draw(Textless(), job.settings, job)  # pyright: ignore[reportArgumentType]


def test_weights_that_are_not_finite_are_one_sentence(here, model, capsys):
    from safetensors.torch import load_file, save_file

    broken = shutil.copytree(model, here / "broken")
    file = broken / "vae" / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    next(iter(state.values())).fill_(float("nan"))
    save_file(state, file, {"format": "pt"})
    assert main(["generate", PROMPT, *TINY, "--model", str(broken)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "vae of" in error and "that is not finite" in error


def test_stopping_leaves_no_file(here, model, monkeypatch, capsys):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(generate, "save_animation", stop)
    monkeypatch.setattr(generate, "save_png", stop)
    assert main(["generate", PROMPT, *TINY, "--model", model, "-o", "one.png"]) == 130
    assert list(here.iterdir()) == []
    assert "stopped" in capsys.readouterr().err


def test_the_defaults_are_the_embedded_models_card():
    from rolling_diffusion.defaults import Card
    from rolling_diffusion.pipeline import SAMPLERS, SPACINGS
    from rolling_diffusion.train.export import CARD

    assert Card.in_folder(locate("embedded")) == Card.of(CARD)
    assert (*SAMPLERS, *SPACINGS) == (*generate.SAMPLERS, *generate.SCHEDULERS)


@pytest.mark.parametrize("content", [b"", b"junk", b"\x08\x00\x00\x00\x00\x00\x00\x00{}      "])
def test_a_file_that_is_no_checkpoint_is_one_sentence(here, capsys, content):
    (here / "flux.safetensors").write_bytes(content)
    assert main(["generate", PROMPT, *TINY, "--model", "flux.safetensors"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "flux.safetensors" in error


def test_a_hub_model_out_of_reach_is_one_sentence(here, capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert main(["generate", PROMPT, *TINY, "--model", "nobody/nothing"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "nobody/nothing is not on this machine" in error


def test_a_lora_acts_by_its_strength_and_is_recorded(here, model):
    from safetensors.torch import save_file

    torch.manual_seed(3)
    name = "transformer.transformer_blocks.0.attn.to_q"
    width = 256
    save_file(
        {f"{name}.lora_A.weight": torch.randn(4, width), f"{name}.lora_B.weight": torch.randn(width, 4)},
        here / "style.safetensors",
    )
    for file, lora in {
        "none": (),
        "off": ("--lora", "style.safetensors=0"),
        "on": ("--lora", "style.safetensors"),
    }.items():
        assert main(["generate", PROMPT, *TINY, "--model", model, *lora, "-o", f"{file}.png"]) == 0
    assert np.array_equal(pixels("none.png"), pixels("off.png"))
    assert not np.array_equal(pixels("none.png"), pixels("on.png"))
    assert main(["generate", "--from", "on.png", "--model", model, "-o", "again.png"]) == 0
    assert np.array_equal(pixels("on.png"), pixels("again.png"))


def test_evaluate_prints_a_table_and_writes_its_numbers(here, model, capsys):
    assert main(["evaluate", *TINY, "--model", model, "--prompts", "6", "--json", "scores.json"]) == 0
    out = capsys.readouterr().out
    scores = json.loads((here / "scores.json").read_text())
    for way in ("full", "rolling", "autoregressive"):
        assert 0 <= scores[way]["score"] <= 1 and len(scores[way]["interval"]) == 2
        assert {"single object", "two objects", "counting", "colours", "position", "colour binding"} <= set(
            scores[way]["tasks"]
        )
        row = next(line for line in out.splitlines() if line.startswith(f"| {way} "))
        assert f"{scores[way]['score']:.3f}" in row
    about = scores["about"]
    assert about["prompts"] == 6 and about["height"] == 64 and about["model"] == "tiny"
    assert main(["evaluate", "--ceiling", "--prompts", "6", "--device", "cpu", "--json", "ceiling.json"]) == 0
    assert capsys.readouterr().out.count("| 1.000 (") == 2 and (here / "ceiling.json").is_file()
    for words in (("--ceiling", "--strip", "2"), ("--ceiling", "--work", "w.jsonl"), ("--strip", "2", "--study")):
        assert main(["evaluate", *words]) == 2
        assert capsys.readouterr().err.count("\n") == 1
    assert main(["evaluate", "--width", "160000000"]) == 2
    assert "of memory, and this machine has" in capsys.readouterr().err


def test_train_refuses_what_it_cannot_do(here, capsys):
    assert main(["train", "--uniform-minutes", "0", "--rolling-minutes", "0"]) == 2
    (here / "file").touch()
    assert main(["train", "--work", "file/x"]) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert "nothing to train" in first and "cannot write to file/x" in second
    assert main(["train", "-o", ".", "--work", "../w"]) == 2
    assert main(["train", "-o", "runs", "--work", "runs/train"]) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert "holds other files, and would be replaced" in first and "which is replaced: name another" in second
    assert (here / "file").exists()
