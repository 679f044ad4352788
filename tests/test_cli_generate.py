"""`rolling-diffusion generate`: what is refused before any model is loaded."""

import json
import sys

import pytest
from PIL import Image

from rolling_diffusion.cli import main
from rolling_diffusion.cli.files import save_png
from rolling_diffusion.cli.model import check_folder, known_words, unknown_words

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
    try:
        code = main(["generate", *argv])
    except SystemExit as stop:
        code = stop.code
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
        (["a ball", "--batch", "0"], ["--batch", "at least 1"]),
        (["a ball", "--dtype", "float23"], ["--dtype", "did you mean 'float32'?"]),
        (["a ball", "--device", "gpu"], ["--device gpu is unknown", "cuda"]),
        (["a ball", "--device", "cuda:99"], ["cuda:99 is not on this machine"]),
        (["a ball", "--model", "no/such/folder"], ["no/such/folder", "no such folder or file"]),
        (["a ball", "--model", "flux.safetensors"], ["flux.safetensors", "no such folder or file"]),
        (["a ball", "--quantize", "int4"], ["--quantize", "did you mean 'int8'?"]),
        (["a ball", "--lora", "style=strong"], ["--lora", "'strong' is no number"]),
        (["a ball", "--steps", "0"], ["--steps", "at least 1"]),
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


def test_a_broken_index_is_named(tmp_path):
    (tmp_path / "model_index.json").write_text("{")
    with pytest.raises(ValueError, match="is not valid JSON"):
        check_folder(tmp_path)


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
