"""The five nodes. V1 classes: static, and the same on every ComfyUI."""

from __future__ import annotations

from typing import Any

import comfy.sample
import comfy.samplers
import comfy.utils
import latent_preview
import torch

from . import inputs
from .flux_dev import FluxDevAutoRegressiveRollingDiffusionSampler as FluxDevAutoRegressiveRollingDiffusionSampler
from .sampler import ADAPTIVE, Rolling, Settings, check_suspendable

CATEGORY = "sampling/custom_sampling"


class AutoregressiveRollingDiffusionSampler:
    """KSampler, with the picture generated in an order."""

    CATEGORY = CATEGORY
    FUNCTION = "sample"
    RETURN_TYPES = ("LATENT",)
    OUTPUT_TOOLTIPS = ("The denoised latent.",)
    DESCRIPTION = (
        "KSampler that generates the picture in an order: finished blocks are remembered and attended to, and a "
        "rolling window of blocks at increasing noise moves over the canvas. A window that covers the canvas gives "
        "KSampler's result."
    )
    SEARCH_ALIASES = ("autoregressive", "rolling", "ksampler", "block", "spiral")

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {
            "required": {
                "model": ("MODEL", {"tooltip": "The model used for denoising the latent."}),
                "positive": ("CONDITIONING", {"tooltip": "What the picture is to show."}),
                "negative": ("CONDITIONING", {"tooltip": "What the picture is not to show."}),
                "latent_image": ("LATENT", {"tooltip": "The latent to denoise; its size is the canvas."}),
                "seed": inputs.SEED,
                "steps": ("INT", {"default": 20, "min": 1, "max": 10000, "tooltip": "Steps that every block takes."}),
                "cfg": ("FLOAT", {"default": 7.0, "min": 0.0, "max": 100.0, "step": 0.1, "round": 0.01,
                                  "tooltip": "Classifier-free guidance. For FLUX.1-dev, which is distilled, 1."}),
                "sampler_name": (comfy.samplers.KSampler.SAMPLERS, {
                    "tooltip": f"ComfyUI's own sampler, run once per block. Not {', '.join(ADAPTIVE)}."}),
                "scheduler": (comfy.samplers.KSampler.SCHEDULERS, {"tooltip": "Noise levels that every block passes."}),
                "denoise": ("FLOAT", {"default": 1.0, "min": 0.0, "max": 1.0, "step": 0.01,
                                      "tooltip": "How much of the latent is denoised; below 1 keeps its structure."}),
                "autoregressive_order": inputs.ORDER,
                "rolling_window_size": inputs.WINDOW,
                "rolling_overlap": inputs.OVERLAP,
                "attention_persistence": inputs.PERSISTENCE,
            },
            "optional": inputs.EXTRAS,
        }  # fmt: skip

    @classmethod
    def VALIDATE_INPUTS(cls, rolling_window_size=None, rolling_overlap=None, sampler_name=None, draft=None, steps=None):
        return inputs.problem(rolling_window_size, rolling_overlap, sampler_name, draft, steps) or True

    def sample(self, model, positive, negative, latent_image, seed, steps, cfg, sampler_name, scheduler, denoise,
               autoregressive_order, rolling_window_size, rolling_overlap, attention_persistence,
               draft=-1, lookahead=-1, context_noise=0.0, memory_cap=0):  # fmt: skip
        settings = Settings(autoregressive_order, rolling_window_size, rolling_overlap, attention_persistence,
                            draft, lookahead, context_noise, memory_cap, seed)  # fmt: skip
        check_suspendable(sampler_name)
        stock = comfy.samplers.KSampler(
            model, steps, model.load_device, sampler_name, scheduler, denoise, model_options=model.model_options
        )
        samples = fit_latent(model, latent_image)
        sigmas = stock.sigmas
        if len(sigmas) > 1:
            settings.check(samples, len(sigmas) - 1)
        noise = comfy.sample.prepare_noise(samples, seed, latent_image.get("batch_index"))
        sampler = Rolling(comfy.samplers.sampler_object(sampler_name), settings)
        out = comfy.sample.sample_custom(
            model, noise, cfg, sampler, sigmas, positive, negative, samples,
            noise_mask=latent_image.get("noise_mask"),
            callback=latent_preview.prepare_callback(model, max(len(sigmas) - 1, 1)),
            disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
            seed=seed,
        )  # fmt: skip
        result = {k: v for k, v in latent_image.items() if not k.startswith("downscale_ratio")}
        return ({**result, "samples": out},)


def fit_latent(model: Any, latent: dict) -> torch.Tensor:
    """An empty latent with the model's channels and, on newer ComfyUIs, its scale; any other as it is."""
    ratios = {k: latent[k] for k in ("downscale_ratio_spacial", "downscale_ratio_temporal") if k in latent}
    return comfy.sample.fix_empty_latent_channels(model, latent["samples"], **ratios)


class RollingSampler:
    """The method as a SAMPLER, for SamplerCustom and SamplerCustomAdvanced."""

    CATEGORY = "sampling/custom_sampling/samplers"
    FUNCTION = "wrap"
    RETURN_TYPES = ("SAMPLER",)
    OUTPUT_TOOLTIPS = ("The sampler that rolls: connect it to SamplerCustomAdvanced.",)
    DESCRIPTION = "Turns any SAMPLER into one that generates the picture block by block, in an order."
    SEARCH_ALIASES = ("autoregressive", "rolling", "sampler custom")

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {
            "required": {
                "sampler": ("SAMPLER", {"tooltip": "The sampler that every block runs, unmodified."}),
                "autoregressive_order": inputs.EVERY_ORDER,
                "rolling_window_size": inputs.WINDOW,
                "rolling_overlap": inputs.OVERLAP,
                "attention_persistence": inputs.PERSISTENCE,
            },
            "optional": inputs.EXTRAS,
        }

    @classmethod
    def VALIDATE_INPUTS(cls, rolling_window_size=None, rolling_overlap=None):
        return inputs.problem(rolling_window_size, rolling_overlap) or True

    def wrap(self, sampler, autoregressive_order, rolling_window_size, rolling_overlap, attention_persistence,
             draft=-1, lookahead=-1, context_noise=0.0, memory_cap=0):  # fmt: skip
        settings = Settings(autoregressive_order, rolling_window_size, rolling_overlap, attention_persistence,
                            draft, lookahead, context_noise, memory_cap)  # fmt: skip
        return (Rolling(sampler, settings),)


class LoadEmbeddedRollingModel:
    """MODEL, CLIP and VAE of the small model that ships with the pack."""

    CATEGORY = "loaders"
    FUNCTION = "load"
    RETURN_TYPES = ("MODEL", "CLIP", "VAE")
    OUTPUT_TOOLTIPS = ("A small Flux trained for rolling.", "Its text encoders.", "Its autoencoder.")
    DESCRIPTION = (
        "The small model that ships with this pack: it draws storybook scenes from simple prompts, such as "
        "'a red house left of a green tree', and needs no download."
    )
    SEARCH_ALIASES = ("embedded", "rolling", "demo model", "checkpoint")

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {"required": {}}

    def load(self):
        from .embedded import load

        return load()


class RollingPlanPreview:
    """The plan as a picture and a text, before anything is sampled."""

    CATEGORY = CATEGORY
    FUNCTION = "draw"
    RETURN_TYPES = ("IMAGE", "STRING")
    RETURN_NAMES = ("image", "cost")
    OUTPUT_TOOLTIPS = ("Noise over ticks and blocks, and the order on the canvas.", "What the plan costs.")
    DESCRIPTION = "Shows the plan that the samplers of this pack would follow with the same parameters, and its cost."
    SEARCH_ALIASES = ("plan", "rolling", "order", "cost")

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {
            "required": {
                "width": ("INT", {"default": 1024, "min": 16, "max": 16384, "step": 16, "tooltip": "Pixels."}),
                "height": ("INT", {"default": 1024, "min": 16, "max": 16384, "step": 16, "tooltip": "Pixels."}),
                "steps": ("INT", {"default": 20, "min": 1, "max": 10000, "tooltip": "Steps that every block takes."}),
                "autoregressive_order": inputs.EVERY_ORDER,
                "rolling_window_size": inputs.WINDOW,
                "rolling_overlap": inputs.OVERLAP,
                "attention_persistence": inputs.PERSISTENCE,
            },
            "optional": {
                "draft": inputs.EXTRAS["draft"],
                "lookahead": inputs.EXTRAS["lookahead"],
                "latent": ("LATENT", {"tooltip": "Takes the canvas from this latent instead of width and height."}),
            },
        }

    @classmethod
    def VALIDATE_INPUTS(cls, rolling_window_size=None, rolling_overlap=None, draft=None, steps=None):
        return inputs.problem(rolling_window_size, rolling_overlap, None, draft, steps) or True

    def draw(self, width, height, steps, autoregressive_order, rolling_window_size, rolling_overlap,
             attention_persistence, draft=-1, lookahead=-1, latent=None):  # fmt: skip
        import numpy

        from ..picture import plan_picture

        settings = Settings(
            autoregressive_order, rolling_window_size, rolling_overlap, attention_persistence, draft, lookahead
        )
        rows, columns = (height // 8, width // 8) if latent is None else latent["samples"].shape[-2:]
        plan = settings.plan(rows, columns, steps, 2)
        pixels = numpy.asarray(plan_picture(plan), dtype=numpy.float32) / 255
        return torch.from_numpy(pixels)[None], str(plan)
