"""The pipeline among diffusers' own: saved, loaded, shared, offloaded, compiled, with LoRAs and quantised weights."""

import errno
import json
import shutil

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, FluxPipeline, FluxTransformer2DModel
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from tiny_pipeline import ROLL, call, parts, pipelines

from rolling_diffusion.models.convert import flux_to_comfy
from rolling_diffusion.models.flux import RollingFluxTransformer2DModel
from rolling_diffusion.pipeline import RollingFluxPipeline, load
from rolling_diffusion.pipeline.loading import explain

LAG_0 = {"lag": 0, "window": 4, "overlap": 2}
CARD = {"trained": True, "cfg": 2.0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "tiny"
    RollingFluxPipeline(**parts(), rolling=CARD).save_pretrained(path)
    return path


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_saved_folders_are_flux_pipelines_with_a_card(folder):
    index = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"] == "FluxPipeline"
    assert index["transformer"] == ["diffusers", "FluxTransformer2DModel"]
    assert index["rolling"] == CARD
    pipe = quiet(RollingFluxPipeline.from_pretrained(folder))
    assert pipe.card.trained
    stock = quiet(FluxPipeline.from_pretrained(folder))
    assert type(stock.transformer) is FluxTransformer2DModel
    assert type(DiffusionPipeline.from_pretrained(folder)) is FluxPipeline
    assert torch.equal(call(pipe, true_cfg_scale=1.0, **LAG_0), call(stock))
    fresh = quiet(RollingFluxPipeline(**parts(), rolling=CARD))  # its weights lie elsewhere in memory
    assert torch.allclose(call(pipe, **ROLL), call(fresh, **ROLL), atol=1e-4)


def test_a_pipeline_without_a_card_says_nothing_of_one(tmp_path):
    RollingFluxPipeline(**parts()).save_pretrained(tmp_path)
    assert "rolling" not in json.loads((tmp_path / "model_index.json").read_text())
    assert RollingFluxPipeline.from_pretrained(tmp_path).config.rolling is None


def test_from_pipe_shares_every_weight_and_leaves_the_stock_pipeline_as_it_was():
    stock, _ = pipelines(True)
    before = call(stock)
    roll = quiet(RollingFluxPipeline.from_pipe(stock))
    assert roll.transformer is stock.transformer and roll.vae is stock.vae
    assert torch.equal(call(stock), before) and torch.equal(call(roll, **LAG_0), before)
    again = quiet(FluxPipeline(**roll.components))
    assert torch.equal(call(again), before)


def lora_file(path, transformer, scale=0.3):
    """A LoRA with random weights for a transformer's attention, as diffusers saves them."""
    torch.manual_seed(5)
    model = FluxTransformer2DModel.from_config(transformer.config)
    model.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_k", "to_v"]))
    weights = {k: scale * torch.randn_like(v) for k, v in get_peft_model_state_dict(model).items()}
    FluxPipeline.save_lora_weights(path.parent, transformer_lora_layers=weights, weight_name=path.name)
    return path


def test_loras_load_scale_switch_and_fuse(tmp_path):
    stock, roll = pipelines(True)
    file = lora_file(tmp_path / "style.safetensors", roll.transformer)
    plain = call(roll, **ROLL)
    for pipe in (stock, roll):
        pipe.load_lora_weights(tmp_path, weight_name=file.name, adapter_name="style")
    with_lora = call(roll, **ROLL)
    assert not torch.allclose(with_lora, plain, atol=1e-3)
    assert torch.equal(call(stock), call(roll, **LAG_0))
    half = {"joint_attention_kwargs": {"scale": 0.5}}
    assert torch.equal(call(stock, **half), call(roll, **LAG_0, **half))
    assert not torch.allclose(call(roll, **ROLL, **half), with_lora, atol=1e-3)
    roll.set_adapters(["style"], [0.0])
    assert torch.allclose(call(roll, **ROLL), plain, atol=1e-5)
    roll.set_adapters(["style"], [1.0])
    roll.fuse_lora()
    assert torch.allclose(call(roll, **ROLL), with_lora, atol=1e-4)
    roll.unfuse_lora()
    roll.unload_lora_weights()
    assert torch.allclose(call(roll, **ROLL), plain, atol=1e-5)


def test_vae_slicing_tiling_and_encoder_only_pipelines():
    _, roll = pipelines()
    image = call(roll, **ROLL, output_type="np")
    roll.vae.enable_slicing()
    roll.vae.enable_tiling()
    assert np.allclose(call(roll, **ROLL, output_type="np"), image, atol=1e-5)
    made = parts()
    texts = RollingFluxPipeline(**{k: v if "text" in k or "token" in k else None for k, v in made.items()})
    embeds, pooled, _ = texts.encode_prompt("a red ball", max_sequence_length=8)
    rest = quiet(RollingFluxPipeline(**{k: None if "text" in k or "token" in k else v for k, v in made.items()}))
    given = {"prompt_embeds": embeds.detach(), "pooled_prompt_embeds": pooled.detach()}
    assert torch.allclose(call(rest, **ROLL, **given), call(roll, **ROLL), atol=1e-5)


def test_group_offload():
    _, roll = pipelines()
    expected = call(roll, **ROLL)
    roll.transformer.enable_group_offload(
        onload_device=torch.device("cpu"), offload_device=torch.device("cpu"), offload_type="leaf_level"
    )
    assert torch.equal(call(roll, **ROLL), expected)


def test_compiled_transformer():
    """The backend is eager: what is tested is that the call can be traced, not what a compiler makes of it."""
    _, roll = pipelines()
    expected = call(roll, **ROLL)
    roll.transformer = torch.compile(roll.transformer, backend="eager")
    assert torch.allclose(call(roll, **ROLL), expected, atol=1e-5)
    assert torch.allclose(call(quiet(RollingFluxPipeline.from_pipe(roll)), **ROLL), expected, atol=1e-5)


@pytest.fixture(scope="module")
def files(folder, tmp_path_factory):
    """The transformer in one file: in Black Forest Labs' names with ComfyUI's prefix, and in diffusers'."""
    path = tmp_path_factory.mktemp("files")
    state = RollingFluxPipeline.from_pretrained(folder).transformer.state_dict()
    comfy = {f"model.diffusion_model.{k}": v.contiguous() for k, v in flux_to_comfy(state).items()}
    save_file(comfy, path / "comfy.safetensors")
    save_file({k: v.contiguous() for k, v in state.items()}, path / "diffusers.safetensors")
    save_file({"x": torch.zeros(3)}, path / "other.safetensors")
    (path / "damaged.safetensors").write_bytes(b"this is no such file")
    return path


def test_load_folders_files_and_loras(folder, files, tmp_path):
    pipe = quiet(load(folder, device="cpu"))
    assert pipe.dtype == torch.float32 and pipe.card.trained
    expected = call(pipe, **ROLL)
    for name in ("comfy", "diffusers"):
        other = quiet(load(files / f"{name}.safetensors", device="cpu", parts=folder))
        assert isinstance(other.transformer, RollingFluxTransformer2DModel)
        assert torch.allclose(call(other, **ROLL), expected, atol=1e-4)
    lora = lora_file(tmp_path / "style.safetensors", pipe.transformer)
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
    file = gguf_file(tmp_path / "tiny.gguf", pipe.transformer.state_dict())
    quantised = load(file, device="cpu", parts=folder)
    assert isinstance(quantised.transformer, RollingFluxTransformer2DModel)
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
