"""FLUX.1-dev's files in ComfyUI's layouts and key names, small and random; and a ComfyUI for such small encoders.

ComfyUI knows T5-XXL by its 24 layers and one of its two sizes; the other sizes lie in two JSON files of the host. So a
small host is a copy of the tree with smaller numbers in those two files, and not a line of code changed.
"""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

T5 = {"d_kv": 8, "num_heads": 2, "num_layers": 24, "vocab_size": 8192}
CLIP = {"hidden_size": 768, "intermediate_size": 16, "num_attention_heads": 12, "num_hidden_layers": 2}
FP8 = torch.float8_e4m3fn


def small_host(comfyui, folder):
    """A copy of the tree whose text encoders are small."""
    shutil.copytree(comfyui, folder, ignore=shutil.ignore_patterns(".git", "custom_nodes", "output", "__pycache__"))
    for name, values in (("comfy/text_encoders/t5_config_xxl.json", t5_sizes()), ("comfy/sd1_clip_config.json", CLIP)):
        config = json.loads((Path(folder) / name).read_text())
        (Path(folder) / name).write_text(json.dumps({**config, **values}))
    return folder


def t5_sizes():
    """The size that this ComfyUI knows T5-XXL by as it is, the other one small."""
    import comfy.sd

    key = "encoder.block.23.layer.1.DenseReluDense.wi_1.weight"
    by_width = comfy.sd.detect_te_model({key: torch.empty(8, 4096, device="meta")}) == comfy.sd.TEModel.T5_XXL
    return {**T5, "d_model": 4096 if by_width else 64, "d_ff": 8 if by_width else 10240}


def fill(module, seed):
    """The module's tensors by name, random, neither vanishing nor exploding."""
    generator, out = torch.Generator().manual_seed(seed), {}
    for name, tensor in module.state_dict().items():
        if "norm" in name and tensor.ndim == 1:
            out[name] = torch.ones(tensor.shape) if name.endswith(("weight", "scale")) else torch.zeros(tensor.shape)
        elif tensor.ndim > 1:
            scale = 1.0 if "embed" in name or "shared" in name else tensor[0].numel() ** -0.5
            out[name] = torch.randn(tensor.shape, generator=generator) * scale
        else:
            out[name] = torch.randn(tensor.shape, generator=generator) * 0.05
    return out


def transformer(host, seed=0, in_channels=16, guidance=True):
    """A Flux transformer by Black Forest Labs' names. Where the host reads no width off a file: one real block."""
    import comfy.ldm.flux.model
    import comfy.ops

    wide = "txt_in_key" not in (host.comfyui / "comfy" / "model_detection.py").read_text()
    config = {
        "in_channels": in_channels, "out_channels": 16, "vec_in_dim": 768, "context_in_dim": t5_sizes()["d_model"],
        "hidden_size": 3072 if wide else 256, "mlp_ratio": 4.0, "num_heads": 24 if wide else 2, "depth": 1,
        "depth_single_blocks": 0 if wide else 2, "axes_dim": [16, 56, 56], "theta": 10000, "patch_size": 2,
        "qkv_bias": True, "guidance_embed": guidance,
    }  # fmt: skip
    if host.tiny._has("txt_ids_dims"):
        config["txt_ids_dims"] = []
    model = comfy.ldm.flux.model.Flux(
        dtype=torch.float32, device="cpu", operations=comfy.ops.disable_weight_init, **config
    )
    state = fill(model, seed)
    return {k.removesuffix("weight") + "scale" if "_norm.weight" in k else k: v for k, v in state.items()}


def clip_l(seed=1):
    import comfy.clip_model
    import comfy.ops

    config = {**_config("comfy/sd1_clip_config.json"), **CLIP}
    return fill(comfy.clip_model.CLIPTextModel(config, torch.float32, "cpu", comfy.ops.disable_weight_init), seed)


def t5xxl(seed=2):
    import comfy.ops
    import comfy.text_encoders.t5

    config = {**_config("comfy/text_encoders/t5_config_xxl.json"), **t5_sizes()}
    return fill(comfy.text_encoders.t5.T5(config, torch.float32, "cpu", comfy.ops.disable_weight_init), seed)


def autoencoder(seed=3):
    """FLUX.1's autoencoder in its real size: ComfyUI reads none of its sizes but the channels off the file."""
    from comfy.ldm.models.autoencoder import AutoencodingEngine

    sizes = {"double_z": True, "z_channels": 16, "resolution": 256, "in_channels": 3, "out_ch": 3, "ch": 128,
             "ch_mult": [1, 2, 4, 4], "num_res_blocks": 2, "attn_resolutions": [], "dropout": 0.0}  # fmt: skip
    engine = AutoencodingEngine(
        regularizer_config={"target": "comfy.ldm.models.autoencoder.DiagonalGaussianRegularizer"},
        encoder_config={"target": "comfy.ldm.modules.diffusionmodules.model.Encoder", "params": sizes},
        decoder_config={"target": "comfy.ldm.modules.diffusionmodules.model.Decoder", "params": sizes},
    )
    return fill(engine, seed)


def _config(name):
    import comfy.sd1_clip

    return json.loads((Path(comfy.sd1_clip.__file__).parents[1] / name).read_text())


def save(path, state, dtype):
    """fp8 as such files have it: vectors stay in 16 bits."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    small = torch.bfloat16 if dtype == FP8 else dtype
    save_file({k: v.to(dtype if v.ndim > 1 else small).contiguous() for k, v in state.items()}, path)
    return path


def checkpoint(host):
    """All of it in one state dict, as flux1-dev-fp8.safetensors has it."""
    parts = {
        "model.diffusion_model.": transformer(host),
        "text_encoders.clip_l.transformer.": clip_l(),
        "text_encoders.t5xxl.transformer.": t5xxl(),
        "vae.": autoencoder(),
    }
    return {prefix + k: v for prefix, state in parts.items() for k, v in state.items()}
