"""`rolling-diffusion generate`: what is refused before any model is loaded."""

import json
import sys
from pathlib import Path

import pytest
from PIL import Image

from rolling_diffusion.cli import main
from rolling_diffusion.cli.files import read_picture, save_png
from rolling_diffusion.cli.main import make_parser
from rolling_diffusion.cli.model import check_folder, cut_off, known_words, lora, unknown_words

PARTS = {
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "transformer": ["rolling_diffusion", "RollingFluxTransformer2DModel"],
    "vae": ["diffusers", "AutoencoderTiny"],
    "image_encoder": [None, None],
}


def make_folder(folder):
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline", **PARTS}))
    for part in ("scheduler", "tokenizer", "transformer", "vae"):
        (folder / part).mkdir()
        (folder / part / "config.json").write_text("{}")
    for part in ("transformer", "vae"):
        (folder / part / "diffusion_pytorch_model.safetensors").touch()
    return folder


def refused(capsys, *argv: str) -> str:
    code = main(["generate", *argv])
    error = capsys.readouterr().err
    assert code == 2, error
    assert error.count("\n") == 1 and error.startswith("rolling-diffusion"), error
    return error


@pytest.mark.parametrize(
    "argv, words",
    [
        ([], ["a prompt is needed"]),
        ([" "], ["a prompt is needed"]),
        (["a red", "ball"], ["no use for 'ball'", "in quotes"]),
        (["a ball", "--sampler", "dpmpp2m"], ["--sampler", "did you mean 'dpmpp_2m'?", "euler"]),
        (["a ball", "--scheduler", "karas"], ["--scheduler", "did you mean 'karras'?"]),
        (["a ball", "--cfg", "-1"], ["--cfg", "at least 0"]),
        (["a ball", "--batch", "0"], ["--batch", "from 1 to 10000"]),
        (["a ball", "--dtype", "float23"], ["--dtype", "did you mean 'float32'?"]),
        (["a ball", "--device", "gpu"], ["--device gpu is unknown", "cuda"]),
        (["a ball", "--device", "cuda:99"], ["cuda:99 is not on this machine"]),
        (["a ball", "--model", "no/such/folder"], ["no/such/folder", "no such folder or file"]),
        (["a ball", "--model", "flux.safetensors"], ["flux.safetensors", "no such folder or file"]),
        (["a ball", "--quantize", "int4"], ["--quantize", "did you mean 'int8'?"]),
        (["a ball", "--lora", "style=strong"], ["--lora", "'strong' is no number"]),
        (["a ball", "--steps", "0"], ["--steps", "from 1 to 10000"]),
        (["a ball", "--lora", "a.safetensors", "--lora", "a.safetensors=0.5"], ["a.safetensors is said twice"]),
        (["a ball", "--width", "16" + "0" * 400], ["--width must be a whole number from 1 to 9223372036854775807"]),
        (["a ball", "--seed", "18446744073709551616"], ["--seed", "from 0 to 18446744073709551615"]),
        (["a ball", "--seed", "9" * 5000], ["--seed", "from 0 to 18446744073709551615"]),
        (["a ball", "--seed", "18446744073709551615", "--batch", "2"], ["--seed", "leaves no seeds for --batch 2"]),
        (["a ball", "--width", "100000000"], ["at least 358 GiB of memory", "this machine has", "smaller --width"]),
        (["a ball", "--device", "meta"], ["--device meta is unknown"]),
        (["a ball", "--model", ""], ["--model is empty", "leave it out"]),
        (["a ball", "--model", "x" * 5000], ["--model xxx", "no such folder or file"]),
        (["a ball", "--model", "~nouser/x"], ["--model ~nouser/x: there is no such folder or file"]),
        (["a ball", "--lora", "=1"], ["--lora", "'=1' has no name"]),
        (["a ball", "--lora", "style=inf"], ["--lora", "'inf' is no number"]),
        (["a ball", "-o", "p.png", "--report", "p.png"], ["--output and --report both name p.png"]),
        (["a ball", "--animation", "x.gif", "--report", "x.gif"], ["--animation and --report both name x.gif"]),
        (
            ["a ball", "--batch", "2", "-o", "b.png", "--report", "b-1.png"],
            ["picture 1 and --report both name b-1.png"],
        ),
        (["a ball", "--report", "/dev/null"], ["/dev/null", "no regular file"]),
        (["a ball", "--image", "no.png"], ["--image no.png: there is no such file"]),
        (["a ball", "--image", __file__], ["--image", "is not a picture that can be read"]),
        (["a ball", "--mask", "m.png"], ["--mask is of a picture to start from", "--image"]),
        (["a ball", "--strength", "0.5"], ["--strength is of a picture to start from", "--image"]),
        (["a ball", "--strength", "1.5"], ["--strength", "from 0 to 1"]),
        (["a ball \udcff"], ["bytes that are no text", "UTF-8"]),
        (["a ball", "--window", "1"], ["window is 1 cells"]),
        (["a ball", "--width", "200"], ["multiple of 16", "192 or 208"]),
        (["a ball", "-o", "/nowhere/x.png"], ["cannot write /nowhere/x.png"]),
        (["a ball", "-o", "x.bmp"], ["x.bmp must end in .png"]),
        (["a ball", "--animation", "x.avi"], ["x.avi must end in .gif or .webp or .mp4"]),
        (["a ball", "--report", "/nowhere/x.json"], ["cannot write /nowhere/x.json"]),
        (["--from", "/nowhere/x.png"], ["there is no file /nowhere/x.png"]),
        (["a ball", "--negative", "x"], ["no option --negative", "did you mean '--negative-prompt'?"]),
    ],
)
def test_bad_input_is_one_sentence_before_the_pipeline_is_imported(capsys, monkeypatch, tmp_path, argv, words):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "rolling_diffusion.pipeline", None)
    error = refused(capsys, *argv)
    assert all(word in error for word in words), error
    assert list(tmp_path.iterdir()) == []


def test_a_whole_model_folder_passes(tmp_path):
    check_folder(make_folder(tmp_path))


@pytest.mark.parametrize(
    "lost, words",
    [
        ("model_index.json", "is not a model folder: it has no model_index.json"),
        ("vae", "has no vae folder"),
        ("transformer/diffusion_pytorch_model.safetensors", "transformer in the model folder .* has no weights"),
        ("tokenizer/config.json", "tokenizer in the model folder .* has no configuration"),
    ],
)
def test_a_missing_part_is_named(tmp_path, lost, words):
    path = make_folder(tmp_path) / lost
    if path.is_dir():
        for file in path.iterdir():
            file.unlink()
        path.rmdir()
    else:
        path.unlink()
    with pytest.raises(ValueError, match=words):
        check_folder(tmp_path)


@pytest.mark.parametrize(
    "content, words",
    [
        ("{", "is not valid JSON"),
        ("[" * 100_000, "is not valid JSON"),
        ("[1]", "must hold an object"),
        ("7", "must hold an object"),
        ('{"rolling": 1}', '"rolling" in'),
        ('{"vae": [], "rolling": null}', '"vae" in'),
    ],
    ids=["broken", "deep", "list", "number", "card", "part"],
)
def test_a_broken_index_is_named(tmp_path, content, words):
    (tmp_path / "model_index.json").write_text(content)
    with pytest.raises(ValueError, match=words) as caught:
        check_folder(tmp_path)
    assert "model_index.json" in str(caught.value)


def test_a_file_with_an_equals_sign_in_its_name_is_one_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my=style.safetensors").touch()
    assert lora("my=style.safetensors") == ("my=style.safetensors", 1.0)
    assert lora("my=style.safetensors=0.5") == ("my=style.safetensors", 0.5)
    assert lora("other.safetensors=0.5") == ("other.safetensors", 0.5)
    assert lora("some/hub") == ("some/hub", 1.0)


@pytest.mark.parametrize("words", [["--negative-prompt", "-blurry"], ["--negative-prompt=-blurry"]])
def test_a_negative_prompt_may_begin_with_a_dash(words):
    values = make_parser().strict(["generate", "a ball", *words, "--steps", "3"])
    assert (values.negative_prompt, values.steps, values.prompt) == ("-blurry", 3, "a ball")


def test_an_option_is_not_taken_for_a_negative_prompt(capsys):
    assert "--negative-prompt expected one argument" in refused(capsys, "a ball", "--negative-prompt", "--steps", "3")


def test_a_mask_of_another_size_is_refused(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (64, 32)).save("photo.png")
    Image.new("L", (32, 32)).save("mask.png")
    error = refused(capsys, "a ball", "--image", "photo.png", "--mask", "mask.png")
    assert "--mask is of 32 × 32 pixels, and must be as large as --image, 64 × 32" in error


@pytest.mark.parametrize(
    "parts, words",
    [
        ('["a ball", 3]', ["parts.json: prompt 2 is 3"]),
        ('[[true, "a ball"]]', ["the place of prompt 1 is true", "pixels, a share, or [left, top, right, bottom]"]),
        ('[[0, "a ball"], [1.5, "a boat"]]', ["the place of 'a boat' is 1.5", "below 1.0"]),
        ('[[0.5, "a ball"]]', ["leave a part of the canvas without one"]),
        ('[[0, "a ball"], [[0, 0, 512, 8], "a boat"]]', ["(0, 0, 512, 8)", "within the canvas of 256 × 256"]),
        (f'[[0, "a ball"], [{"9" * 400}, "a boat"]]', ["the place of 'a boat'", "pixels from 0 to 255"]),
        ("[]", ["parts.json: prompts must be a list, with one at least"]),
    ],
)
def test_prompts_of_parts_that_cannot_be_are_one_sentence(capsys, tmp_path, monkeypatch, parts, words):
    monkeypatch.chdir(tmp_path)
    Path("parts.json").write_text(parts)
    error = refused(capsys, "--prompts", "parts.json")
    assert all(word in error for word in words), error
    assert "say one of them" in refused(capsys, "a ball", "--prompts", "parts.json")


def test_the_file_of_prompts_is_not_written_to(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("parts.json").write_text('["a ball"]')
    assert "--prompts and --report both name" in refused(
        capsys, "--prompts", "parts.json", "--report", str(tmp_path / "parts.json")
    )
    assert Path("parts.json").read_text() == '["a ball"]'


def test_what_is_transparent_is_not_lost_silently(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    picture = Image.new("RGBA", (64, 64), (200, 0, 0, 255))
    picture.save("solid.png")
    assert read_picture(Path("solid.png"), "--image", "RGB").getpixel((0, 0)) == (200, 0, 0)
    picture.putpixel((3, 3), (200, 0, 0, 0))
    picture.save("clear.png")
    assert "--image clear.png has transparent parts" in refused(capsys, "a ball", "--image", "clear.png")


def test_settings_of_a_picture_need_a_prompt_too(capsys, tmp_path):
    save_png(tmp_path / "plan.png", Image.new("RGB", (8, 8)), {"order": "raster"})
    assert "a prompt is needed" in refused(capsys, "--from", str(tmp_path / "plan.png"))


def word_tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "</s>", "<unk>", "red", "ball", "a"]
    raw = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>", pad_token="<pad>", eos_token="</s>")


def test_unknown_words_are_found_once_and_in_order():
    tokenizer = word_tokenizer()
    assert unknown_words(tokenizer, "A Red dragon, a ball; a dragon at 7") == ["dragon", "at", "7"]
    assert unknown_words(tokenizer, "a red ball") == []
    assert known_words(tokenizer) == ["a", "ball", "red"]


def test_words_that_become_nothing_are_unknown():
    from rolling_diffusion.train.export import tokenizers

    _, tokenizer = tokenizers()
    assert unknown_words(tokenizer, "красный шар, 赤いボール 🎈 3 red balls — 7!") == [
        *("красный", "шар", "赤いボール", "🎈", "7")
    ]


def test_what_is_cut_off_is_found_with_and_without_offsets():
    tokenizer = word_tokenizer()
    text = "a red ball, a red ball"
    assert cut_off(tokenizer, text, 5) == "red ball" and cut_off(tokenizer, text, 7) == ""

    class Slow:
        """A tokenizer that does not know where its tokens were."""

        is_fast = False
        num_special_tokens_to_add, decode = tokenizer.num_special_tokens_to_add, tokenizer.decode

        def __call__(self, text, add_special_tokens):
            return tokenizer(text, add_special_tokens=add_special_tokens)

    assert cut_off(Slow(), text, 5) == "red ball"
