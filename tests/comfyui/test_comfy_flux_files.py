"""The Flux-Dev node on an ordinary install: small files in ComfyUI's layouts, names and types, over HTTP."""

import os
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

NODE = "FluxDevAutoRegressiveRollingDiffusionSampler"
VALUES = {"prompt": "a red house", "negative_prompt": "", "width": 256, "height": 256, "seed": 3, "steps": 3,
          "cfg": 3.5, "autoregressive_order": "top-to-bottom", "rolling_window_size": 64, "rolling_overlap": 16,
          "attention_persistence": 0.5, "enable_cpu_offload": "True"}  # fmt: skip


@pytest.fixture(scope="module")
def install(host, tmp_path_factory):
    """A server without any Flux, and its models folder."""
    sys.path.insert(0, str(Path(__file__).parent))
    import tiny_files
    from own_server import Server

    tree = tiny_files.small_host(os.environ["COMFYUI_PATH"], tmp_path_factory.mktemp("host") / "ComfyUI")
    server = Server(tmp_path_factory.mktemp("install"), tree)
    server.models, server.tiny = server.base / "models", tiny_files
    yield server
    server.stop()


def run(server, **values):
    """The history entry of the node with these values, and the pictures it made."""
    links = {k: values.pop(k) for k in list(values) if isinstance(values[k], list)}
    extra = values.pop("nodes", {})
    values = {k: v for k, v in values.items() if v is not None}
    prompt = {"1": {"class_type": NODE, "inputs": {**VALUES, **values, **links}},
              "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 1], "filename_prefix": "flux"}},
              "3": {"class_type": "SaveLatent", "inputs": {"samples": ["1", 0], "filename_prefix": "flux"}},
              **extra}  # fmt: skip
    return server.run(prompt)


def latent(server, entry):
    """The latent of a run, in fp32."""
    from safetensors.torch import load_file

    assert entry["status"]["status_str"] == "success", entry["status"]["messages"][-1]
    [file] = entry["outputs"]["3"]["latents"]
    return load_file(server.base / "output" / file["subfolder"] / file["filename"])["latent_tensor"]


def picture(server, entry):
    [file] = entry["outputs"]["2"]["images"]
    return Image.open(server.base / "output" / file["subfolder"] / file["filename"])


def failure(entry):
    assert entry["status"]["status_str"] == "error"
    return next(m[1] for m in entry["status"]["messages"] if m[0] == "execution_error")


def choices(server):
    return server.get(f"/object_info/{NODE}")[NODE]["input"]["optional"]["model"][0]


def test_without_weights_one_sentence_says_what_to_do(install):
    assert choices(install) == ["FLUX.1-dev", "embedded"]
    error = failure(run(install))
    assert error["node_type"] == NODE
    for word in ("flux1-dev.safetensors", "models/diffusion_models", "clip_l.safetensors", "t5xxl", "ae.safetensors",
                 "models/text_encoders", "models/vae", "models/checkpoints", "licence", "hf auth login"):  # fmt: skip
        assert word in error["exception_message"], word


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_files_of_their_own(install, host, dtype):
    """The usual folders and names. Relatives beside it are not taken for it; what is missing is named."""
    tiny, models = install.tiny, install.models
    state = tiny.transformer(host)
    for name in ("flux1-dev.safetensors", "flux1-kontext-dev.safetensors"):
        tiny.save(models / "diffusion_models" / name, state, dtype)
    tiny.save(models / "unet" / "flux1-fill-dev.safetensors", tiny.transformer(host, in_channels=96), dtype)
    tiny.save(models / "unet" / "flux1-canny-dev.safetensors", tiny.transformer(host, in_channels=32), dtype)
    tiny.save(models / "unet" / "flux1-schnell.safetensors", tiny.transformer(host, guidance=False), dtype)
    assert choices(install) == ["FLUX.1-dev", "embedded", "diffusion_models/flux1-dev.safetensors"]
    encoders = models / ("clip" if dtype == torch.float16 else "text_encoders")
    if not list(models.glob("*/clip_l.safetensors")):
        message = failure(run(install))["exception_message"]
        assert "diffusion_models/flux1-dev.safetensors is there" in message
        assert "clip_l" in message and "t5xxl" in message and "ae.safetensors" in message
    for old in (*models.glob("*/clip_l*"), *models.glob("*/t5xxl*")):
        old.unlink()
    tiny.save(encoders / "clip_l.safetensors", tiny.clip_l(), torch.float16)
    tiny.save(encoders / "t5xxl_fp8_e4m3fn.safetensors", tiny.t5xxl(), torch.float8_e4m3fn)
    tiny.save(encoders / "t5xxl_fp16.safetensors", tiny.t5xxl(), torch.float16)
    tiny.save(models / "vae" / "ae.safetensors", tiny.autoencoder(), torch.bfloat16)
    entry = run(install)
    out = latent(install, entry)
    assert out.shape == (1, 16, 32, 32) and out.isfinite().all() and out.std() > 0.1
    image = picture(install, entry)
    assert image.size == (256, 256) and len(image.getcolors(1 << 24)) > 50


def stock(text="a red house", negative=None, size=256):
    """The node's own work as a graph of stock nodes: without a negative prompt, and one block."""
    return {
        "10": {"class_type": "UNETLoader", "inputs": {"unet_name": "flux1-dev.safetensors", "weight_dtype": "default"}},
        "11": {"class_type": "DualCLIPLoader", "inputs": {
            "clip_name1": "clip_l.safetensors", "clip_name2": "t5xxl_fp8_e4m3fn.safetensors", "type": "flux"}},
        "12": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["11", 0], "text": text}},
        "13": {"class_type": "FluxGuidance", "inputs": {"conditioning": ["12", 0], "guidance": 3.5}},
        "14": {"class_type": "ModelSamplingFlux", "inputs": {"model": ["10", 0], "max_shift": 1.15, "base_shift": 0.5,
                                                             "width": size, "height": size}},
        "15": {"class_type": "EmptySD3LatentImage", "inputs": {"width": size, "height": size, "batch_size": 1}},
        "16": {"class_type": "KSampler", "inputs": {"model": ["14", 0], "positive": ["13", 0], "negative": ["13", 0],
               "latent_image": ["15", 0], "seed": 3, "steps": 3, "cfg": 1.0, "sampler_name": "euler",
               "scheduler": "simple", "denoise": 1.0}},
        "17": {"class_type": "VAELoader", "inputs": {"vae_name": "ae.safetensors"}},
        "18": {"class_type": "SaveLatent", "inputs": {"samples": ["16", 0], "filename_prefix": "stock"}},
    }  # fmt: skip


def test_one_block_is_the_stock_graph_bit_for_bit(install):
    """An 8-bit transformer goes with the 8-bit T5, as in the graph."""
    entry = run(install, fit_window=False, nodes=stock())
    ours = latent(install, entry)
    entry["outputs"]["3"] = entry["outputs"]["18"]
    assert torch.equal(ours, latent(install, entry))
    assert not torch.equal(ours, latent(install, run(install)))  # fitted, it rolls


def test_sockets_take_what_is_loaded(install):
    """A MODEL, CLIP and VAE of other nodes, all or some; the rest comes from the files. The schedule is the model's."""
    nodes = {k: v for k, v in stock().items() if k not in ("15", "16", "18")}
    expected = latent(install, run(install))
    for sockets in ({"loaded_model": ["14", 0], "clip": ["11", 0], "vae": ["17", 0]}, {"clip": ["11", 0]},
                    {"loaded_model": ["14", 0], "clip": ["11", 0]}):  # fmt: skip
        assert torch.equal(latent(install, run(install, nodes=dict(nodes), **sockets)), expected)
    assert not torch.equal(latent(install, run(install, nodes=dict(nodes), loaded_model=["10", 0])), expected)


def test_a_negative_prompt_leaves_the_embedded_guidance_at_the_models_own(install):
    """At cfg 1 the difference of the two prompts weighs nothing: the picture of guidance 3.5 without one."""
    expected = latent(install, run(install))
    assert torch.equal(latent(install, run(install, negative_prompt="a tree", cfg=1.0)), expected)
    assert not torch.equal(latent(install, run(install, negative_prompt="a tree", cfg=7.0)), expected)


def test_one_checkpoint_with_everything(install, host):
    """flux1-dev-fp8.safetensors in checkpoints, nothing else: the same picture as from the four files."""
    tiny, models = install.tiny, install.models
    expected = latent(install, run(install))
    for old in models.glob("*/*.safetensors"):
        old.unlink()
    tiny.save(models / "checkpoints" / "flux1-dev-fp8.safetensors", tiny.checkpoint(host), torch.float8_e4m3fn)
    assert choices(install) == ["FLUX.1-dev", "embedded", "checkpoints/flux1-dev-fp8.safetensors"]
    out = latent(install, run(install))
    assert out.isfinite().all() and out.std() > 0.1
    named = latent(install, run(install, model="checkpoints/flux1-dev-fp8.safetensors"))
    assert torch.equal(named, out)
    assert (out - expected).abs().mean() < 0.2 * expected.abs().mean()  # the autoencoder and CLIP are in 8 bits too


def test_a_folder_of_diffusers(install):
    """The second way: models/diffusers, through the library's own pipeline."""
    import tiny_folder

    tiny_folder.make(install.models / "diffusers" / "FLUX.1-dev", guidance=True)
    assert choices(install)[-1] == "diffusers/FLUX.1-dev"
    entry = run(install, model="diffusers/FLUX.1-dev")
    assert latent(install, entry).isfinite().all() and picture(install, entry).size == (256, 256)


def test_the_embedded_model(install):
    entry = run(install, model="embedded", cfg=2.5)
    assert latent(install, entry).isfinite().all() and picture(install, entry).size == (256, 256)
