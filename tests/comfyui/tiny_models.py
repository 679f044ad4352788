"""Tiny random models of the real structures, in a running ComfyUI."""

import comfy.model_patcher
import comfy.supported_models
import torch

CPU = torch.device("cpu")


def _fill(module, seed):
    """Random weights that neither vanish nor explode through the layers."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.ndim > 1:
                fan = parameter[0].numel()
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * fan**-0.5)
            elif "norm" in name or name.endswith("scale"):
                parameter.fill_(1)
            else:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return module


def flux(seed=0, guidance=False, in_channels=16, dtype=torch.float32, blocks=(1, 2)):
    """A Flux of width 256 (2 heads of 128), random, text width 32, pooled width 24."""
    config = {
        "image_model": "flux",
        "in_channels": in_channels,
        "out_channels": 16,
        "vec_in_dim": 24,
        "context_in_dim": 32,
        "hidden_size": 256,
        "mlp_ratio": 4.0,
        "num_heads": 2,
        "depth": blocks[0],
        "depth_single_blocks": blocks[1],
        "axes_dim": [16, 56, 56],
        "theta": 10000,
        "patch_size": 2,
        "qkv_bias": True,
        "guidance_embed": guidance,
        "txt_ids_dims": [],
        "dtype": dtype,
    }
    if not _has("txt_ids_dims"):
        del config["txt_ids_dims"]
    return _patcher(comfy.supported_models.Flux(config), seed, dtype)


def flux2(seed=0):
    """A Flux 2 (shared modulation, patch 1, 128 channels), where this ComfyUI has one."""
    config = {
        "image_model": "flux2",
        "in_channels": 128,
        "out_channels": 128,
        "vec_in_dim": None,
        "context_in_dim": 32,
        "hidden_size": 256,
        "mlp_ratio": 3.0,
        "num_heads": 2,
        "depth": 1,
        "depth_single_blocks": 2,
        "axes_dim": [32, 32, 32, 32],
        "theta": 2000,
        "patch_size": 1,
        "qkv_bias": False,
        "guidance_embed": False,
        "txt_ids_dims": [3],
        "global_modulation": True,
        "mlp_silu_act": True,
        "ops_bias": False,
        "default_ref_method": "index",
        "ref_index_scale": 10.0,
        "dtype": torch.float32,
    }
    return _patcher(comfy.supported_models.Flux2(config), seed, torch.float32)


def sd(seed=1):
    """An SD 1.5-type UNet: 4 latent channels, two scales, self- and cross-attention."""
    config = {
        "image_size": 32,
        "in_channels": 4,
        "out_channels": 4,
        "model_channels": 32,
        "num_res_blocks": [1, 1],
        "channel_mult": [1, 2],  # attention at the lower scale alone, for speed
        "num_heads": 2,
        "num_head_channels": -1,
        "use_spatial_transformer": True,
        "use_linear_in_transformer": False,
        "context_dim": 32,
        "transformer_depth": [0, 1],
        "transformer_depth_output": [0, 0, 1, 1],
        "transformer_depth_middle": 1,
        "use_temporal_attention": False,
        "adm_in_channels": None,
        "legacy": False,
        "dtype": torch.float32,
    }
    return _patcher(comfy.supported_models.SD15(config), seed, torch.float32)


def sdxl(seed=2, refiner=False):
    """SDXL's UNet, or its refiner's: three scales, CLIP-L's and CLIP-G's text side by side, sizes in a vector."""
    config = {
        "image_size": 32,
        "in_channels": 4,
        "out_channels": 4,
        "model_channels": 32,
        "num_res_blocks": [1, 1, 1],
        "channel_mult": [1, 2, 4],
        "num_head_channels": 16,
        "use_spatial_transformer": True,
        "use_linear_in_transformer": True,
        "context_dim": 1280 if refiner else 768 + 1280,
        "transformer_depth": [0, 1, 1],
        "transformer_depth_output": [0, 0, 1, 1, 1, 1],
        "transformer_depth_middle": 1,
        "use_temporal_attention": False,
        "num_classes": "sequential",
        "adm_in_channels": 1280 + (5 if refiner else 6) * 256,
        "legacy": False,
        "dtype": torch.float32,
    }
    kind = comfy.supported_models.SDXLRefiner if refiner else comfy.supported_models.SDXL
    return _patcher(kind(config), seed, torch.float32)


def pixart(seed=3):
    """A PixArt Sigma: a transformer that takes no square below 34×34 cells."""
    config = {
        "image_model": "pixart_sigma",
        "num_heads": 2,
        "patch_size": 2,
        "hidden_size": 128,
        "in_channels": 4,
        "depth": 1,
        "model_max_length": 120,
        "input_size": 128,
        "pe_interpolation": 2,
        "micro_condition": False,
        "caption_channels": 32,
        "dtype": torch.float32,
    }
    return _patcher(comfy.supported_models.PixArtSigma(config), seed, torch.float32)


def _has(name):
    import dataclasses

    from comfy.ldm.flux.model import FluxParams

    return name in {f.name for f in dataclasses.fields(FluxParams)}


def _patcher(config, seed, dtype):
    config.set_inference_dtype(dtype, None)
    model = config.get_model({}, "", device=CPU)
    _fill(model.diffusion_model, seed)
    return comfy.model_patcher.ModelPatcher(model.eval(), load_device=CPU, offload_device=CPU)


def conditioning(seed, tokens=5, width=32, pooled=24, **options):
    """A random prompt, as CLIP Text Encode would give it."""
    generator = torch.Generator().manual_seed(100 + seed)
    text = torch.randn(1, tokens, width, generator=generator)
    return [[text, {"pooled_output": torch.randn(1, pooled, generator=generator), **options}]]


def latent(height, width, channels=16, batch=1, seed=None):
    """An empty latent, or a random one where a seed is given."""
    shape = batch, channels, height, width
    samples = torch.zeros(shape) if seed is None else torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return {"samples": samples}
