"""Models in files: folders, checkpoints in one file, GGUF, LoRAs, quantised on loading; and what is wrong with them."""

import errno
import shutil

import pytest
import torch
from diffusers import DiffusionPipeline, FluxPipeline, FluxTransformer2DModel
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from tiny_pipeline import call, pipeline

from rolling_diffusion.loading import explain, load
from rolling_diffusion.models.convert import flux_to_comfy
from rolling_diffusion.pipeline import roll

ROLL = {"window": 8, "overlap": 4, "draft": 0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "tiny"
    pipeline().save_pretrained(path)
    return path


def quiet(pipe):
    """The pipeline, rolled, without bars."""
    pipe.set_progress_bar_config(disable=True)
    return roll(pipe)


def test_a_card_in_a_folder_is_read_and_harms_no_other_reader(folder, tmp_path):
    import json

    carded = tmp_path / "carded"
    shutil.copytree(folder, carded)
    index = carded / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"rolling": {"trained": True, "cfg": 2.0}}))
    assert roll(FluxPipeline.from_pretrained(carded)).card.trained
    assert roll(DiffusionPipeline.from_pretrained(carded)).card.cfg == 2.0
    assert roll(load(carded, device="cpu")).has_card
    assert not roll(FluxPipeline.from_pretrained(folder)).has_card


def lora_file(path, transformer, scale=0.3):
    """A LoRA with random weights for a transformer's attention, as diffusers saves them."""
    torch.manual_seed(5)
    model = FluxTransformer2DModel.from_config(transformer.config)
    model.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_k", "to_v"]))
    weights = {k: scale * torch.randn_like(v) for k, v in get_peft_model_state_dict(model).items()}
    FluxPipeline.save_lora_weights(path.parent, transformer_lora_layers=weights, weight_name=path.name)
    return path


@pytest.fixture(scope="module")
def files(folder, tmp_path_factory):
    """The transformer in one file: in Black Forest Labs' names with ComfyUI's prefix, and in diffusers'."""
    path = tmp_path_factory.mktemp("files")
    state = FluxPipeline.from_pretrained(folder).transformer.state_dict()
    comfy = {f"model.diffusion_model.{k}": v.contiguous() for k, v in flux_to_comfy(state).items()}
    save_file(comfy, path / "comfy.safetensors")
    save_file({k: v.contiguous() for k, v in state.items()}, path / "diffusers.safetensors")
    save_file({"x": torch.zeros(3)}, path / "other.safetensors")
    (path / "damaged.safetensors").write_bytes(b"this is no such file")
    return path


def test_load_folders_files_and_loras(folder, files, tmp_path):
    pipe = quiet(load(folder, device="cpu"))
    assert pipe.pipe.dtype == torch.float32
    expected = call(pipe, **ROLL)
    for name in ("comfy", "diffusers"):
        other = quiet(load(files / f"{name}.safetensors", device="cpu", parts=folder))
        assert isinstance(other.pipe.transformer, FluxTransformer2DModel)
        assert torch.allclose(call(other, **ROLL), expected, atol=1e-4)
    lora = lora_file(tmp_path / "style.safetensors", pipe.pipe.transformer)
    strong, weak = (quiet(load(folder, device="cpu", lora={lora: s})) for s in (1.0, 0.0))
    assert not torch.allclose(call(strong, **ROLL), expected, atol=1e-3)
    assert torch.allclose(call(weak, **ROLL), expected, atol=1e-5)


def gguf_file(path, state):
    """A transformer as GGUF, its matrices in 8 bits where their rows consist of whole blocks of 32."""
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(path, "flux")
    for name, weight in state.items():
        fits = weight.ndim == 2 and weight.shape[1] % 32 == 0
        kind = gguf.GGMLQuantizationType.Q8_0 if fits else gguf.GGMLQuantizationType.F32
        writer.add_tensor(name, gguf.quants.quantize(weight.float().numpy(), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def distance(pipe, expected):
    """How far a rolling run lies from the expected latents, relative to them; and it must not be the same."""
    found = call(quiet(pipe), **ROLL)
    assert not torch.equal(found, expected)
    return (found - expected).norm() / expected.norm()


def test_gguf_files_roll(folder, tmp_path):
    pipe = quiet(load(folder, device="cpu"))
    file = gguf_file(tmp_path / "tiny.gguf", pipe.pipe.transformer.state_dict())
    quantised = load(file, device="cpu", parts=folder)
    assert isinstance(quantised.transformer, FluxTransformer2DModel)
    assert distance(quantised, call(pipe, **ROLL)) < 0.05
    with pytest.raises(ValueError, match="is quantised already: leave int8 out"):
        load(file, device="cpu", parts=folder, quantize="int8")


@pytest.mark.parametrize(("name", "most"), [("int8", 0.03), ("fp8", 0.1)])
def test_models_quantised_on_loading_roll(folder, name, most):
    pytest.importorskip("torchao")
    expected = call(quiet(load(folder, device="cpu")), **ROLL)
    assert distance(load(folder, device="cpu", quantize=name), expected) < most


def test_load_says_what_is_wrong_in_one_sentence(folder, files, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    shutil.rmtree(broken / "text_encoder_2")
    (tmp_path / "empty").mkdir()
    (tmp_path / "picture.png").write_bytes(b"")
    wrong = {
        "neither": (tmp_path / "neither", {}, "there is no folder or file"),
        "empty folder": (tmp_path / "empty", {}, "has no model_index.json"),
        "part missing": (broken, {}, "is not whole"),
        "suffix": (tmp_path / "picture.png", {}, "must be a folder, or a file that ends in .safetensors"),
        "not Flux": (files / "other.safetensors", {}, "is not a Flux checkpoint"),
        "damaged": (files / "damaged.safetensors", {}, "is damaged, or not a safetensors file"),
        "offline": ("someone/nothing", {}, "could not be downloaded: check the network"),
        "parts offline": (files / "comfy.safetensors", {"parts": "someone/parts"}, "someone/parts, which holds what"),
        "lora": (folder, {"lora": files / "other.safetensors"}, "is not a LoRA for Flux"),
        "no lora": (folder, {"lora": tmp_path / "no.safetensors"}, "there is no LoRA file"),
        "quantizer": (folder, {"quantize": "int3"}, "quantize is 'int3'"),
        "offload": (folder, {"cpu_offload": True}, "leave it out"),
        "offload name": (folder, {"cpu_offload": "all"}, "cpu_offload is 'all'"),
    }
    for name, (model, more, sentence) in wrong.items():
        with pytest.raises(ValueError, match=sentence) as caught:
            load(model, device="cpu", **more)
        assert "\n" not in str(caught.value), name


def test_errors_of_the_hub_and_of_the_disk():
    class Response:
        headers: dict = {}  # noqa: RUF012
        request = None

    def chained(error: Exception, cause: Exception) -> Exception:
        error.__cause__ = cause
        return error

    name = "black-forest-labs/FLUX.1-dev"
    gated = GatedRepoError("Access to model is restricted", response=Response())
    assert explain(chained(OSError("wrapped"), gated), name) == (
        f"{name} is gated: accept its licence on https://huggingface.co/{name}, then log in with `hf auth login`"
    )
    missing = RepositoryNotFoundError("404", response=Response())
    assert explain(missing, "a/b").startswith("There is no repository a/b")
    full = OSError(errno.ENOSPC, "No space left on device")
    assert explain(full, name).startswith(f"There is not enough disk for {name}")
    assert "check the network" in explain(chained(OSError("x"), LocalEntryNotFoundError("y")), name)
    assert "pip install torchao" in explain(ImportError("No module named 'torchao'"), "it")
