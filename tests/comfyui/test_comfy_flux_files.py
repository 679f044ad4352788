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
    for word in ("flux1-dev.safetensors", "models/diffusion_models", "clip_l.safetensors", "t5xxl", "models/text_encoders",
                 "ae.safetensors", "models/vae", "models/checkpoints", "licence", "hf auth login"):  # fmt: skip
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
