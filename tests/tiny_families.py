"""Tiny random pipelines of every family, with their own text left out: prompts are embeddings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import numpy as np
import torch
from PIL import Image
from tiny_flux import CONFIG as FLUX

SIDE = 32  # pixels of a canvas; the tiny VAEs make a cell of one pixel, so also cells
ROLL = {"window": 16, "overlap": 8, "draft": 1}  # on 32 × 24 cells: 4 strips
CPU = torch.device("cpu")
TEXT_TO_IMAGE = "FluxPipeline", "Flux2Pipeline", "StableDiffusion3Pipeline"
WITH_CONTROL = *TEXT_TO_IMAGE, "FluxControlNetPipeline"


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max())


def noisy(model: torch.nn.Module) -> Any:
    """Nothing at its initial 0 or 1, so that nothing is tested by accident."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def picture(seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8))


def mask() -> Image.Image:
    """The lower two thirds are to be drawn anew."""
    pixels = np.zeros((SIDE, SIDE), np.uint8)
    pixels[SIDE // 3 :] = 255
    return Image.fromarray(pixels)


def vae(channels: int = 4) -> Any:
    torch.manual_seed(0)
    made = diffusers.AutoencoderKL(
        block_out_channels=(4,),
        latent_channels=channels,
        norm_num_groups=1,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.06,
        scaling_factor=1.5,
    )
    return made.eval()


def flux_parts(**changes: Any) -> dict[str, Any]:
    torch.manual_seed(0)
    parts: dict[str, Any] = {
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        "vae": vae(),
        "transformer": noisy(diffusers.FluxTransformer2DModel(**FLUX | changes)),
    }
    return parts | dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))


def flux(kind: str = "FluxPipeline", **changes: Any) -> tuple[Any, dict[str, Any]]:
    """A pipeline of FLUX.1 and the prompt of its calls."""
    pipe = getattr(diffusers, kind)(**flux_parts(**changes))
    return pipe, {"prompt_embeds": normal(1, 7, 24), "pooled_prompt_embeds": normal(1, 20)}


def _img2img() -> tuple[Any, dict[str, Any]]:
    pipe, prompt = flux("FluxImg2ImgPipeline")
    return pipe, prompt | {"image": picture(), "strength": 0.8}


def _inpaint() -> tuple[Any, dict[str, Any]]:
    pipe, prompt = flux("FluxInpaintPipeline")
    return pipe, prompt | {"image": picture(), "mask_image": mask(), "strength": 0.8}


def _fill() -> tuple[Any, dict[str, Any]]:
    # Beside the noise: the picture, and a mask of as many channels as a pixel of the VAE is large.
    pipe, prompt = flux("FluxFillPipeline", in_channels=16 + 16 + 4, out_channels=16)
    return pipe, prompt | {"image": picture(), "mask_image": mask()}


def _control() -> tuple[Any, dict[str, Any]]:
    pipe, prompt = flux("FluxControlPipeline", in_channels=32, out_channels=16)
    return pipe, prompt | {"control_image": picture()}


def _controlnet() -> tuple[Any, dict[str, Any]]:
    parts = flux_parts()
    settings = {name: value for name, value in FLUX.items() if name != "num_layers"}
    torch.manual_seed(1)
    parts["controlnet"] = noisy(diffusers.FluxControlNetModel(**settings | {"num_single_layers": 1}, num_layers=1))
    _, prompt = flux()
    return diffusers.FluxControlNetPipeline(**parts), prompt | {"control_image": picture()}


def _kontext() -> tuple[Any, dict[str, Any]]:
    pipe, prompt = flux("FluxKontextPipeline")
    return pipe, prompt | {"image": picture(), "max_area": SIDE * SIDE, "_auto_resize": False}


def _flux2(kind: str) -> tuple[Any, dict[str, Any]]:
    torch.manual_seed(0)
    transformer = diffusers.Flux2Transformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        timestep_guidance_channels=32,
        axes_dims_rope=(4, 4, 4, 4),
        **({"guidance_embeds": False} if "Klein" in kind else {}),
    )
    autoencoder = diffusers.AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
        block_out_channels=(4,),
        latent_channels=4,
        norm_num_groups=1,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ).eval()
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    pipe = getattr(diffusers, kind)(
        scheduler=scheduler, vae=autoencoder, text_encoder=None, tokenizer=None, transformer=noisy(transformer)
    )
    prompt = {"prompt_embeds": normal(1, 7, 16)}
    if "Klein" in kind:
        prompt |= {"negative_prompt_embeds": normal(1, 7, 16, seed=1), "guidance_scale": 3.0}
    return pipe, prompt


def _flux2_edit() -> tuple[Any, dict[str, Any]]:
    pipe, prompt = _flux2("Flux2Pipeline")
    return pipe, prompt | {"image": [picture().resize((64, 64))]}


def _sd3(kind: str, **changes: Any) -> tuple[Any, dict[str, Any]]:
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "sample_size": SIDE,
        "patch_size": 2,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 3,
        "attention_head_dim": 8,
        "num_attention_heads": 4,
        "caption_projection_dim": 32,
        "joint_attention_dim": 32,
        "pooled_projection_dim": 20,
        "pos_embed_max_size": 24,
        "dual_attention_layers": (1,),
        "qk_norm": "rms_norm",
    }
    transformer = noisy(diffusers.SD3Transformer2DModel(**settings | changes))
    empty = dict.fromkeys(f"{part}{i}" for part in ("text_encoder", "tokenizer") for i in ("", "_2", "_3"))
    channels = settings["out_channels"] if kind != "StableDiffusion3InpaintPipeline" else 16
    pipe = getattr(diffusers, kind)(
        transformer=transformer, scheduler=diffusers.FlowMatchEulerDiscreteScheduler(), vae=vae(channels), **empty
    )
    prompt = {f"{sign}prompt_embeds": normal(1, 7, 32, seed=i) for i, sign in enumerate(("", "negative_"))}
    prompt |= {f"{sign}pooled_prompt_embeds": normal(1, 20, seed=i) for i, sign in enumerate(("", "negative_"))}
    prompt_and_more = {
        "StableDiffusion3Pipeline": {},
        "StableDiffusion3Img2ImgPipeline": {"image": picture(), "strength": 0.8},
        "StableDiffusion3InpaintPipeline": {"image": picture(), "mask_image": mask(), "strength": 0.8},
    }[kind]
    return pipe, prompt | prompt_and_more | {"guidance_scale": 3.0}


MAKERS: dict[str, Callable[[], tuple[Any, dict[str, Any]]]] = {
    "FluxPipeline": flux,
    "FluxPipeline, distilled": lambda: flux(guidance_embeds=True),
    "FluxImg2ImgPipeline": _img2img,
    "FluxInpaintPipeline": _inpaint,
    "FluxFillPipeline": _fill,
    "FluxControlPipeline": _control,
    "FluxControlNetPipeline": _controlnet,
    "FluxKontextPipeline": _kontext,
    "Flux2Pipeline": lambda: _flux2("Flux2Pipeline"),
    "Flux2Pipeline, editing": _flux2_edit,
    "Flux2KleinPipeline": lambda: _flux2("Flux2KleinPipeline"),
    "StableDiffusion3Pipeline": lambda: _sd3("StableDiffusion3Pipeline"),
    "StableDiffusion3Img2ImgPipeline": lambda: _sd3("StableDiffusion3Img2ImgPipeline"),
    "StableDiffusion3InpaintPipeline": lambda: _sd3("StableDiffusion3InpaintPipeline", in_channels=16, out_channels=16),
}


def make(name: str) -> tuple[Any, dict[str, Any]]:
    """A pipeline by name, silent, and the arguments that its calls need beside a size."""
    pipe, arguments = MAKERS[name]()
    pipe.set_progress_bar_config(disable=True)
    return pipe, arguments | {"height": SIDE, "width": SIDE - 8, "num_inference_steps": 4, "output_type": "latent"}


def draw(call: Callable[..., Any], arguments: dict[str, Any], seed: int = 1, **changes: Any) -> Any:
    """What a call of a pipeline, rolled or not, gives as its images."""
    return call(**{**arguments, "generator": torch.Generator().manual_seed(seed), **changes}).images
