"""Conversion to ComfyUI's keys and back, against diffusers' own reader of FLUX.1's files."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from diffusers import AutoencoderTiny, FluxTransformer2DModel
from diffusers.loaders.single_file_utils import convert_flux_transformer_checkpoint_to_diffusers
from safetensors.torch import load_file
from tiny_flux import models
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from rolling_diffusion.models.convert import (
    clip_to_comfy,
    convert_folder,
    flux_from_comfy,
    flux_to_comfy,
    t5_to_comfy,
    tiny_vae_to_comfy,
)


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("guidance", [False, True])
def test_a_transformer_comes_back_from_comfyui_s_keys_unchanged(guidance: bool):
    state = models(guidance)[0].state_dict()
    comfy = flux_to_comfy(state)
    assert comfy["double_blocks.1.img_attn.qkv.weight"].shape == (96, 32)
    assert comfy["single_blocks.1.linear1.bias"].shape == (96 + 128,)
    assert {"double_blocks.0.txt_attn.norm.key_norm.scale", "final_layer.adaLN_modulation.1.weight"} <= comfy.keys()
    assert ("guidance_in.in_layer.weight" in comfy) == guidance
    assert equal(flux_from_comfy(comfy), state)
    prefixed = {f"model.diffusion_model.{key}": tensor for key, tensor in comfy.items()}
    assert equal(flux_from_comfy({**prefixed, "vae.decoder.conv_in.weight": torch.zeros(1)}), state)
    renamed = {k.replace("_norm.scale", "_norm.weight"): tensor for k, tensor in comfy.items()}
    assert equal(flux_from_comfy(renamed), state)


@pytest.mark.parametrize("guidance", [False, True])
def test_diffusers_reads_converted_keys_as_flux_1(guidance: bool):
    """Its reader knows FLUX.1's width alone: tensors of that many rows and a single column keep this small."""
    with torch.device("meta"):
        meta = FluxTransformer2DModel(num_layers=2, num_single_layers=2, guidance_embeds=guidance).state_dict()
    g = torch.Generator().manual_seed(0)
    state = {key: torch.randn((t.shape[0], 1)[: t.ndim], generator=g) for key, t in meta.items()}
    comfy = flux_to_comfy(state)
    assert equal(flux_from_comfy(comfy), state)
    assert equal(convert_flux_transformer_checkpoint_to_diffusers(dict(comfy)), state)


def test_tensors_that_are_not_flux_are_refused():
    state = models()[0].state_dict()
    with pytest.raises(ValueError, match=r"to_q.lora_A.*fuse LoRA"):
        flux_to_comfy({**state, "transformer_blocks.0.attn.to_q.lora_A.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"no img_in\.weight"):
        flux_from_comfy({"conv_in.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match="distilled_guidance_layer"):
        flux_from_comfy({**flux_to_comfy(state), "distilled_guidance_layer.in_proj.weight": torch.zeros(1)})


class Clamp(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x / 3) * 3


@torch.no_grad()
def test_comfyui_s_tiny_autoencoder_decodes_and_encodes_as_diffusers_does():
    torch.manual_seed(0)
    vae = AutoencoderTiny(latent_channels=16, scaling_factor=0.8, shift_factor=0.25).eval()
    comfy = tiny_vae_to_comfy(vae.state_dict(), dict(vae.config))
    assert comfy["taesd_decoder.1.weight"].shape == (64, 16, 3, 3), "the key and shape that ComfyUI looks for"
    # ComfyUI's modules, of the same layers: its decoder begins with a clamp, its encoder takes pictures in 0 to 1.
    encoder = nn.Sequential(*AutoencoderTiny(latent_channels=16).encoder.layers)
    decoder = nn.Sequential(Clamp(), *AutoencoderTiny(latent_channels=16).decoder.layers)
    for module, prefix in ((encoder, "taesd_encoder."), (decoder, "taesd_decoder.")):
        module.load_state_dict({k[len(prefix) :]: t for k, t in comfy.items() if k.startswith(prefix)}, strict=True)

    latents, picture = torch.randn(1, 16, 4, 4), torch.rand(1, 3, 32, 32) * 2 - 1
    given = latents / 0.3611 + 0.1159  # what ComfyUI hands a Flux VAE
    decoded = decoder((given - comfy["vae_shift"]) * comfy["vae_scale"]).sub(0.5).mul(2)
    torch.testing.assert_close(decoded, vae.decode(latents / 0.8 + 0.25).sample, atol=1e-5, rtol=1e-4)
    encoded = encoder(picture * 0.5 + 0.5) / comfy["vae_scale"] + comfy["vae_shift"]
    expected = (vae.encode(picture).latents - 0.25) * 0.8
    torch.testing.assert_close((encoded - 0.1159) * 0.3611, expected, atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="num_decoder_blocks"):
        tiny_vae_to_comfy(vae.state_dict(), {**vae.config, "num_decoder_blocks": [1, 1, 1, 1]})


def text_encoders() -> tuple[CLIPTextModel, T5EncoderModel]:
    sizes = {"vocab_size": 99, "bos_token_id": 0, "eos_token_id": 1}
    clip = CLIPTextConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, **sizes)
    t5 = T5Config(d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, vocab_size=99, feed_forward_proj="gated-gelu")
    return CLIPTextModel(clip), T5EncoderModel(t5)


def test_text_encoders_get_the_keys_that_comfyui_detects():
    clip, t5 = text_encoders()
    state = clip_to_comfy(clip.state_dict())
    assert all(key.startswith("text_model.") for key in state) and len(state) == len(clip.state_dict())
    assert equal(clip_to_comfy(state), state)
    state = t5_to_comfy(t5.state_dict())
    assert "shared.weight" in state and "encoder.embed_tokens.weight" not in state
    assert "encoder.block.0.layer.0.SelfAttention.k.weight" in state
    with pytest.raises(ValueError, match="second layer"):
        clip_to_comfy({"encoder.layers.0.mlp.fc1.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match="not the state dict of a T5"):
        t5_to_comfy({"encoder.block.0.layer_norm.weight": torch.zeros(1)})


def test_a_model_folder_becomes_four_files(tmp_path):
    _, rolling = models()
    clip, t5 = text_encoders()
    vae = AutoencoderTiny(latent_channels=16)
    folder = tmp_path / "little"
    for name, part in (("transformer", rolling), ("text_encoder", clip), ("text_encoder_2", t5), ("vae", vae)):
        part.save_pretrained(folder / name)
    files = convert_folder(folder, tmp_path / "models")
    assert [str(file.relative_to(tmp_path / "models")) for file in files] == [
        "diffusion_models/little.safetensors",
        "text_encoders/little_clip_l.safetensors",
        "text_encoders/little_t5.safetensors",
        "vae/little.safetensors",
    ]
    assert equal(flux_from_comfy(load_file(files[0])), rolling.state_dict())
    assert load_file(files[3])["vae_scale"].item() == pytest.approx(0.3611)

    config = folder / "vae" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "_class_name": "AutoencoderKL"}))
    with pytest.raises(ValueError, match="AutoencoderTiny"):
        convert_folder(folder, tmp_path / "other")
    (folder / "text_encoder_2" / "model.safetensors").unlink()
    config.write_text(json.dumps({**json.loads(config.read_text()), "_class_name": "AutoencoderTiny"}))
    with pytest.raises(ValueError, match="text_encoder_2 holds no"):
        convert_folder(folder, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_conversion_needs_no_diffusers():
    code = (
        "import sys, rolling_diffusion.models.convert; print(sorted({'diffusers', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
