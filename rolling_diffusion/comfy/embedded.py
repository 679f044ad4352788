"""The shipped model as ComfyUI's MODEL, CLIP and VAE."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import comfy.latent_formats
import comfy.model_management as management
import comfy.model_patcher
import comfy.sd
import comfy.supported_models
import comfy.utils
import torch
from comfy.ldm.flux.model import FluxParams
from torch import Tensor, nn

FOLDER = Path(__file__).resolve().parents[1] / "embedded"


def load(folder: Path = FOLDER) -> tuple[Any, Any, Any]:
    """MODEL, CLIP and VAE of a small Flux folder in diffusers layout. FileNotFoundError names what is missing."""
    for part in ("transformer", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "vae", "scheduler"):
        if not (folder / part).is_dir():
            raise FileNotFoundError(
                f"The embedded model is incomplete: {folder} has no folder '{part}'. Install the pack again."
            )
    model, clip, vae = load_model(folder), load_clip(folder), load_vae(folder)
    model.model.latent_format = Latents(vae)
    return model, clip, vae


class Latents(comfy.latent_formats.Flux):
    """FLUX.1's scale of latents, with the colours of this autoencoder's own: previews are made of them."""

    def __init__(self, vae: Any):
        super().__init__()
        self.taesd_decoder_name = None  # the decoder of FLUX.1's latents cannot read these
        generator = torch.Generator().manual_seed(0)
        plain = torch.rand(1, 32, 32, 3, generator=generator)
        pixels = plain.repeat_interleave(8, 1).repeat_interleave(8, 2)
        pixels = (pixels + 0.1 * torch.randn(pixels.shape, generator=generator)).clamp(0, 1)
        latents = self.process_in(vae.encode(pixels).float().cpu())[0].flatten(1).T
        colours = pixels.unflatten(1, (32, 8)).unflatten(3, (32, 8)).mean((2, 4)).reshape(-1, 3) * 2 - 1
        known = torch.cat([latents, torch.ones(len(latents), 1)], 1)
        fitted = torch.linalg.lstsq(known, colours).solution
        self.latent_rgb_factors, self.latent_rgb_factors_bias = fitted[:-1].tolist(), fitted[-1].tolist()


def _read(folder: Path) -> tuple[dict, dict[str, Tensor]]:
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(
            f"The embedded model is incomplete: {folder} has no .safetensors file. Install the pack again."
        )
    state: dict[str, Tensor] = {}
    for file in files:
        state.update(comfy.utils.load_torch_file(str(file), safe_load=True))
    return json.loads((folder / "config.json").read_text(encoding="utf-8")), state


def load_model(folder: Path) -> Any:
    """A ModelPatcher. The width is the checkpoint's own, which older ComfyUIs do not read off a file."""
    from ..models.convert import flux_to_comfy

    config, state = _read(folder / "transformer")
    state = flux_to_comfy(state)
    heads, dim = config["num_attention_heads"], config["attention_head_dim"]
    unet = {
        "image_model": "flux",
        "in_channels": config["in_channels"] // 4,
        "out_channels": (config.get("out_channels") or config["in_channels"]) // 4,
        "vec_in_dim": config["pooled_projection_dim"],
        "context_in_dim": config["joint_attention_dim"],
        "hidden_size": heads * dim,
        "mlp_ratio": 4.0,
        "num_heads": heads,
        "depth": config["num_layers"],
        "depth_single_blocks": config["num_single_layers"],
        "axes_dim": list(config["axes_dims_rope"]),
        "theta": 10000,
        "patch_size": 2,
        "qkv_bias": True,
        "guidance_embed": config["guidance_embeds"],
    }
    if "txt_ids_dims" in {field.name for field in dataclasses.fields(FluxParams)}:
        unet["txt_ids_dims"] = []
    model_config = comfy.supported_models.FluxSchnell(unet)  # Flux without the shift of FLUX.1-dev
    scheduler = json.loads((folder / "scheduler" / "scheduler_config.json").read_text(encoding="utf-8"))
    model_config.sampling_settings = {"multiplier": 1.0, "shift": float(scheduler.get("shift", 1.0))}
    device, offload = management.get_torch_device(), management.unet_offload_device()
    dtypes = model_config.supported_inference_dtypes
    dtype = management.unet_dtype(model_params=comfy.utils.calculate_parameters(state), supported_dtypes=dtypes)
    model_config.set_inference_dtype(dtype, management.unet_manual_cast(dtype, device, dtypes))
    model = model_config.get_model(state, "")
    model.load_model_weights(state, "")
    return comfy.model_patcher.ModelPatcher(model, load_device=device, offload_device=offload)


def load_vae(folder: Path) -> Any:
    from ..models.convert import tiny_vae_to_comfy

    config, state = _read(folder / "vae")
    return comfy.sd.VAE(sd=tiny_vae_to_comfy(state, config))


def load_clip(folder: Path) -> Any:
    """A CLIP whose tokenizers know words, not pieces of words: ComfyUI's own cannot read them."""
    target = SimpleNamespace(
        params={},
        clip=lambda **kwargs: Encoders(folder),
        tokenizer=lambda **kwargs: Tokenizers(folder),
    )
    return comfy.sd.CLIP(target, parameters=1)


class Tokenizers:
    """Prompt to {"l": …, "t5xxl": …}, each one row of (id, weight) pairs of the model's fixed length."""

    def __init__(self, folder: Path):
        from transformers import AutoTokenizer

        self.by_name = {
            "l": AutoTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True),
            "t5xxl": AutoTokenizer.from_pretrained(folder / "tokenizer_2", local_files_only=True),
        }
        limits = [t.model_max_length for t in self.by_name.values()]
        self.length = min(limits)

    def tokenize_with_weights(self, text: str, return_word_ids: bool = False, **kwargs: Any) -> dict[str, list]:
        """Weights such as (red:1.2) are not read: a small vocabulary has no brackets."""
        out = {}
        for name, tokenizer in self.by_name.items():
            ids = tokenizer(text, padding="max_length", max_length=self.length, truncation=True).input_ids
            out[name] = [[(token, 1.0, 0) if return_word_ids else (token, 1.0) for token in ids]]
        return out

    def untokenize(self, pairs: list) -> list:
        return [(pair, self.by_name["l"].decode([pair[0]])) for pair in pairs]

    def state_dict(self) -> dict:
        return {}


class Encoders(nn.Module):
    """T5 for the text tokens and CLIP for the pooled vector, as FluxPipeline uses them."""

    def __init__(self, folder: Path):
        super().__init__()
        from transformers import CLIPTextModel, T5EncoderModel

        options: dict[str, Any] = {"local_files_only": True, "use_safetensors": True}
        self.clip_l = CLIPTextModel.from_pretrained(folder / "text_encoder", **options).float().eval()
        self.t5xxl = T5EncoderModel.from_pretrained(folder / "text_encoder_2", **options).float().eval()
        self.dtypes = {torch.float32}

    def set_clip_options(self, options: dict) -> None:
        """Neither encoder has options: there is no layer to skip in so small a model."""

    def reset_clip_options(self) -> None:
        pass

    @torch.no_grad()
    def encode_token_weights(self, tokens: dict[str, list]) -> tuple[Tensor, Tensor]:
        """(1, tokens, width) and (1, width), on the device that ComfyUI keeps conditionings on."""
        ids = {k: torch.tensor([[pair[0] for pair in row] for row in rows]) for k, rows in tokens.items()}
        text = self.t5xxl(ids["t5xxl"].to(self.t5xxl.device)).last_hidden_state
        pooled = self.clip_l(ids["l"].to(self.clip_l.device)).pooler_output
        device = management.intermediate_device()
        return text.to(device), pooled.to(device)

    def load_sd(self, state: dict) -> Any:
        return self.load_state_dict(state, strict=False)
