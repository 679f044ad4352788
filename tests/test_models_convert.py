"""Conversion to ComfyUI's keys and back, against diffusers' own reader of FLUX.1's files."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from diffusers import AutoencoderTiny, FluxTransformer2DModel
from diffusers.loaders.single_file_utils import convert_flux_transformer_checkpoint_to_diffusers
from tiny_flux import model
from torch import Tensor, nn

from rolling_diffusion.models.convert import (
    flux_from_comfy,
    flux_to_comfy,
    tiny_vae_to_comfy,
)


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("guidance", [False, True])
def test_a_transformer_comes_back_from_comfyui_s_keys_unchanged(guidance: bool):
    state = model(guidance).state_dict()
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
    state = model().state_dict()
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


def test_conversion_needs_no_diffusers():
    code = (
        "import sys, rolling_diffusion.models.convert; print(sorted({'diffusers', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
