"""What is loaded is whole: damaged weights, configurations and names are refused, each with one sentence."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_pipeline import call, pipeline

from rolling_diffusion.loading import load
from rolling_diffusion.models.convert import flux_to_comfy


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "tiny"
    pipeline().save_pretrained(folder)
    return folder


@pytest.fixture()
def folder(whole, tmp_path):
    """A copy to damage."""
    return shutil.copytree(whole, tmp_path / "tiny")


def weights(folder, part):
    (file,) = (folder / part).glob("*.safetensors")
    return file, load_file(file)


def rewrite(file, change):
    file.write_text(json.dumps(change(json.loads(file.read_text()))))


def refused(model, **more) -> str:
    with pytest.raises(ValueError) as caught:
        load(model, device="cpu", **more)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("part", ["text_encoder", "text_encoder_2", "transformer", "vae"])
def test_a_weight_that_is_missing_is_named(folder, part):
    file, state = weights(folder, part)
    lost = [
        name for name in state if name.endswith(("q_proj.weight", "wo.weight", "x_embedder.weight", "conv_in.bias"))
    ]
    del state[lost[-1]]
    save_file(state, file, {"format": "pt"})
    error = refused(folder)
    assert part in error and "lacks" in error and lost[-1].removeprefix("text_model.") in error


@pytest.mark.parametrize("part", ["text_encoder", "transformer"])
def test_weights_that_are_all_foreign_are_refused(folder, part):
    file, state = weights(folder, part)
    save_file({f"other.{name}": value for name, value in state.items()}, file, {"format": "pt"})
    error = refused(folder)
    assert part in error and "lacks" in error and "more" in error


@pytest.mark.parametrize(
    "part, change, name",
    [
        ("transformer", {"num_layers": -1}, "transformer_blocks.0."),
        ("text_encoder", {"num_hidden_layers": 0}, "encoder.layers.0."),
        ("text_encoder_2", {"num_layers": 0}, "encoder.block.0."),
        ("vae", {"layers_per_block": 0}, ".resnets."),
    ],
)
def test_layers_that_the_configuration_does_not_count_are_refused(folder, part, change, name):
    rewrite(folder / part / "config.json", lambda c: c | change)
    error = refused(folder)
    # The second: transformers 4 refuses a T5 without layers by itself.
    ours = f"{part} in {folder} has weights that its config.json has no place for: " in error and name in error
    assert ours or (part == "text_encoder_2" and "not part of the modules in T5Stack" in error)


def test_other_models_beside_a_text_encoder_do_no_harm(folder):
    others = {"text_encoder": "vision_model.x", "text_encoder_2": "lm_head.weight"}
    for part, name in others.items():
        file, state = weights(folder, part)
        more = {name: torch.zeros(2)}
        if part == "text_encoder":
            more["text_model.embeddings.position_ids"] = torch.arange(8)[None]
        save_file(state | more, file, {"format": "pt"})
    assert load(folder, device="cpu").text_encoder is not None


@pytest.mark.parametrize("part", ["text_encoder_2", "transformer", "vae"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(folder, part, value):
    file, state = weights(folder, part)
    name = max(state, key=lambda n: state[n].numel())
    state[name].view(-1)[3] = value
    save_file(state, file, {"format": "pt"})
    assert f"{part} of {folder} has {name} that is not finite" in refused(folder)


def test_a_file_with_a_weight_missing_is_refused(whole, tmp_path):
    state = weights(whole, "transformer")[1]
    del state["context_embedder.weight"]
    save_file(state, tmp_path / "diffusers.safetensors")
    save_file({k: v.contiguous() for k, v in flux_to_comfy(state).items()}, tmp_path / "comfy.safetensors")
    for file, name in {"diffusers": "context_embedder.weight", "comfy": "txt_in.weight"}.items():
        error = refused(tmp_path / f"{file}.safetensors", parts=whole)
        assert f"{file}.safetensors lacks {name}: " in error


@pytest.mark.parametrize(
    "content, words",
    [
        ("[1, 2]", "must hold an object"),
        ("7", "must hold an object"),
        ("[" * 100_000, "is not valid JSON"),
        ('{"rolling": 1}', '"rolling" in'),
        ('{"vae": [1]}', '"vae" in'),
        ('{"vae": []}', '"vae" in'),
    ],
)
def test_an_index_that_names_no_parts_is_refused(folder, content, words):
    (folder / "model_index.json").write_text(content)
    error = refused(folder)
    assert words in error and "model_index.json" in error


@pytest.mark.parametrize("axes", [[4, 4], "abc", [4.0, 6.0, 6.0], [3, 7, 6], None, [-2, 12, 6]])
def test_positions_that_do_not_fill_a_head_are_refused(folder, axes):
    rewrite(folder / "transformer" / "config.json", lambda c: c | {"axes_dims_rope": axes})
    assert str(folder) in refused(folder)


@pytest.mark.parametrize("name", ["x" * 5000, "~nouser/x", ""])
def test_a_name_that_can_be_no_model_is_refused(name):
    error = refused(name)
    assert "is no name of a file" in error and len(error) < 200


@pytest.mark.parametrize(
    "content", [b"junk", b"GGUF", b"GGUF\x03\x00\x00\x00" + b"\xff" * 40], ids=["junk", "empty", "cut"]
)
def test_a_damaged_gguf_file_is_itself_to_blame(whole, tmp_path, content):
    pytest.importorskip("gguf")
    (tmp_path / "model.gguf").write_bytes(content)
    error = refused(tmp_path / "model.gguf", parts=whole)
    assert error.startswith(str(tmp_path / "model.gguf")) and "which holds what" not in error


def test_a_lora_that_is_a_folder_without_weights_is_to_blame(whole, tmp_path, monkeypatch):
    pytest.importorskip("peft")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert "~ is not a LoRA: the folder holds no .safetensors file" in refused(whole, lora="~")
    assert "'' is no name of a file" in refused(whole, lora="")


def test_a_variant_of_the_weights_is_loaded_by_its_name(folder):
    for part in ("transformer", "text_encoder"):
        (file,) = (folder / part).glob("*.safetensors")
        file.rename(file.with_suffix(".fp16.safetensors"))
    pipe = load(folder, device="cpu", variant="fp16")
    pipe.set_progress_bar_config(disable=True)
    assert call(pipe).isfinite().all()
    assert "has weights of a variant only, fp16: name it" in refused(folder)
    assert "has no variant bf16: it has fp16" in refused(folder, variant="bf16")
    assert torch.equal(pipe.transformer.x_embedder.weight, weights(folder, "transformer")[1]["x_embedder.weight"])
