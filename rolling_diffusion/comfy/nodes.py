"""The nodes. V1 classes: static, and the same on every ComfyUI."""

from __future__ import annotations

from typing import Any

import comfy.sample
import comfy.samplers
import comfy.utils
import latent_preview
import torch

from . import inputs
from .flux import per_block_noise
from .flux_dev import FluxDevAutoRegressiveRollingDiffusionSampler as FluxDevAutoRegressiveRollingDiffusionSampler
from .sampler import ADAPTIVE, Rolling, check_suspendable
from .settings import Settings, cell_pixels
from .windows import plan_of_windows

CATEGORY = "sampling/custom_sampling"


SOCKETS: Any = {
    "model": inputs.lazy("MODEL", "The model used for denoising the latent."),
    "positive": inputs.lazy("CONDITIONING", "What the picture is to show."),
    "negative": inputs.lazy("CONDITIONING", "What the picture is not to show."),
    "latent_image": inputs.lazy("LATENT", "The latent to denoise; its size is the canvas."),
}
STEPS: Any = ("INT", {"default": 20, "min": 1, "max": 10000, "tooltip": "Steps that every block takes."})
CFG: Any = ("FLOAT", {
    "default": 7.0, "min": 0.0, "max": 100.0, "step": 0.1, "round": 0.01,
    "tooltip": "Classifier-free guidance. For FLUX.1-dev, which is distilled, 1; for the embedded model, 2.5.",
})  # fmt: skip
SAMPLER: Any = (comfy.samplers.KSampler.SAMPLERS, {
    "tooltip": f"ComfyUI's own sampler, run once per block. Not {', '.join(ADAPTIVE)}."})  # fmt: skip
SCHEDULER: Any = (comfy.samplers.KSampler.SCHEDULERS, {"tooltip": "Noise levels that every block passes."})
ROLLING: Any = {
    "rolling_window_size": inputs.WINDOW,
    "rolling_overlap": inputs.OVERLAP,
    "attention_persistence": inputs.PERSISTENCE,
}


class AutoregressiveRollingDiffusionSampler(inputs.Early):
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
    SEARCH_ALIASES = ("ksampler", "rolling", "autoregressive", "block by block", "spiral")

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {
            "required": {
                **SOCKETS,
                "seed": inputs.SEED,
                "steps": STEPS,
                "cfg": CFG,
                "sampler_name": SAMPLER,
                "scheduler": SCHEDULER,
                "denoise": ("FLOAT", {"default": 1.0, "min": 0.0, "max": 1.0, "step": 0.01,
                                      "tooltip": "How much of the latent is denoised; below 1 keeps its structure."}),
                "autoregressive_order": inputs.ORDER,
                **ROLLING,
            },
            "optional": {**inputs.EXTRAS, **inputs.NEWER},
        }  # fmt: skip

    def sample(self, model, positive, negative, latent_image, seed, steps, cfg, sampler_name, scheduler, denoise,
               autoregressive_order, rolling_window_size, rolling_overlap, attention_persistence,
               draft=-1, lookahead=-1, context_noise=0.0, memory_cap=0, extrapolation=0.0):  # fmt: skip
        settings = Settings(autoregressive_order, rolling_window_size, rolling_overlap, attention_persistence,
                            draft, lookahead, context_noise, memory_cap, seed, extrapolation)  # fmt: skip
        stock = comfy.samplers.KSampler(
            model, steps, model.load_device, sampler_name, scheduler, denoise, model_options=model.model_options
        )
        return (
            sample_latent(model, positive, negative, latent_image, seed, cfg, sampler_name, stock.sigmas, settings),
        )


class AutoregressiveRollingDiffusionSamplerAdvanced(inputs.Early):
    """KSampler (Advanced), with the picture generated in an order."""

    CATEGORY = CATEGORY
    FUNCTION = "sample"
    RETURN_TYPES = ("LATENT",)
    OUTPUT_TOOLTIPS = ("The latent, with the noise that is left over if asked for.",)
    DESCRIPTION = (
        "KSampler (Advanced) that generates the picture in an order: some of the steps, with or without adding noise, "
        "and with noise left over for a second sampler, as a base model and its refiner need it."
    )
    SEARCH_ALIASES = ("ksampler advanced", "rolling", "autoregressive", "refiner", "leftover noise")

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {
            "required": {
                **SOCKETS,
                "add_noise": (["enable", "disable"], {"tooltip": "Whether noise is added to the latent first."}),
                "noise_seed": inputs.SEED,
                "steps": ("INT", {**STEPS[1], "tooltip": "Steps of the whole schedule."}),
                "cfg": CFG,
                "sampler_name": SAMPLER,
                "scheduler": SCHEDULER,
                "start_at_step": ("INT", {"default": 0, "min": 0, "max": 10000, "tooltip": "The first step taken."}),
                "end_at_step": ("INT", {"default": 10000, "min": 0, "max": 10000,
                                        "tooltip": "The step before which to stop."}),
                "return_with_leftover_noise": (["disable", "enable"], {
                    "tooltip": "Whether noise that is left at end_at_step stays in, for a second sampler."}),
                "autoregressive_order": inputs.ORDER,
                **ROLLING,
            },
            "optional": {**inputs.EXTRAS, **inputs.NEWER},
        }  # fmt: skip

    def sample(self, model, positive, negative, latent_image, add_noise, noise_seed, steps, cfg, sampler_name,
               scheduler, start_at_step, end_at_step, return_with_leftover_noise, autoregressive_order,
               rolling_window_size, rolling_overlap, attention_persistence,
               draft=-1, lookahead=-1, context_noise=0.0, memory_cap=0, extrapolation=0.0):  # fmt: skip
        settings = Settings(autoregressive_order, rolling_window_size, rolling_overlap, attention_persistence,
                            draft, lookahead, context_noise, memory_cap, noise_seed, extrapolation)  # fmt: skip
        stock = comfy.samplers.KSampler(
            model, steps, model.load_device, sampler_name, scheduler, 1.0, model_options=model.model_options
        )
        # As KSampler.sample cuts its sigmas.
        sigmas = stock.sigmas
        if end_at_step < len(sigmas) - 1:
            sigmas = sigmas[: end_at_step + 1].clone()
            if return_with_leftover_noise == "disable":
                sigmas[-1] = 0
        sigmas = sigmas[start_at_step:] if start_at_step < len(sigmas) - 1 else sigmas[:0]
        return (sample_latent(model, positive, negative, latent_image, noise_seed, cfg, sampler_name, sigmas, settings,
                        noisy=add_noise == "enable"),)  # fmt: skip


def sample_latent(
    model, positive, negative, latent_image, seed, cfg, sampler_name, sigmas, settings, noisy=True, notes=None,
    origin=None,
):  # fmt: skip
    """The LATENT after these sigmas. notes, origin: as `Rolling`'s."""
    check_suspendable(sampler_name)
    samples = fit_latent(model, latent_image)
    result = {k: v for k, v in latent_image.items() if not k.startswith("downscale_ratio")}
    if len(sigmas) > 1:
        settings.check(samples, len(sigmas) - 1)
    elif not noisy or len(sigmas) == 0:
        return {**result, "samples": samples}
    if noisy:
        noise = comfy.sample.prepare_noise(samples, seed, latent_image.get("batch_index"))
    else:
        noise = torch.zeros(samples.size(), dtype=samples.dtype, layout=samples.layout, device="cpu")
    rolling = Rolling(comfy.samplers.sampler_object(sampler_name), settings, notes, origin)
    out = comfy.sample.sample_custom(
        model, noise, cfg, rolling, sigmas, positive, negative,
        samples,
        noise_mask=latent_image.get("noise_mask"),
        callback=latent_preview.prepare_callback(model, max(len(sigmas) - 1, 1)),
        disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
        seed=seed,
    )  # fmt: skip
    if rolling.kept is not None:  # models scale latents, and scaling back rounds
        out = torch.where(rolling.kept.to(out.device), samples.to(out), out)
    return {**result, "samples": out}


def fit_latent(model: Any, latent: dict) -> torch.Tensor:
    """An empty latent with the model's channels and, on newer ComfyUIs, its scale; any other as it is."""
    ratios = {k: latent[k] for k in ("downscale_ratio_spacial", "downscale_ratio_temporal") if k in latent}
    return comfy.sample.fix_empty_latent_channels(model, latent["samples"], **ratios)


class RollingSampler(inputs.Early):
    """The method as a SAMPLER, for SamplerCustom and SamplerCustomAdvanced."""

    CATEGORY = "sampling/custom_sampling/samplers"
    FUNCTION = "wrap"
    RETURN_TYPES = ("SAMPLER",)
    OUTPUT_TOOLTIPS = ("The sampler that rolls: connect it to SamplerCustomAdvanced.",)
    DESCRIPTION = "Turns any SAMPLER into one that generates the picture block by block, in an order."
    SEARCH_ALIASES = ("rolling", "ksampler select", "autoregressive", "sampler custom")

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {
            "required": {
                "sampler": inputs.lazy("SAMPLER", "The sampler that every block runs, unmodified."),
                "autoregressive_order": inputs.EVERY_ORDER,
                **ROLLING,
            },
            "optional": {**inputs.EXTRAS, **inputs.NEWER},
        }

    def wrap(self, sampler, autoregressive_order, rolling_window_size, rolling_overlap, attention_persistence,
             draft=-1, lookahead=-1, context_noise=0.0, memory_cap=0, extrapolation=0.0):  # fmt: skip
        settings = Settings(autoregressive_order, rolling_window_size, rolling_overlap, attention_persistence,
                            draft, lookahead, context_noise, memory_cap, extrapolation=extrapolation)  # fmt: skip
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


class RollingPlanPreview(inputs.Early):
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
        pixels = {"default": 1024, "min": 16, "max": inputs.MOST_PIXELS, "step": 16, "tooltip": "Pixels."}
        return {
            "required": {
                "width": ("INT", pixels),
                "height": ("INT", pixels),
                "steps": STEPS,
                "autoregressive_order": inputs.EVERY_ORDER,
                **ROLLING,
            },
            "optional": {
                "draft": inputs.EXTRAS["draft"],
                "lookahead": inputs.EXTRAS["lookahead"],
                "model": inputs.lazy("MODEL", "Shows what this model gets and costs; without one, Flux is assumed."),
                "latent": inputs.lazy("LATENT", "Takes the canvas from this latent instead of width and height."),
            },
        }

    def draw(self, width, height, steps, autoregressive_order, rolling_window_size, rolling_overlap,
             attention_persistence, draft=-1, lookahead=-1, model=None, latent=None):  # fmt: skip
        import numpy

        from ..picture import plan_picture

        flux, why_not, multiple, pixels = True, "", 2, 8
        if model is not None:
            flux, why_not = per_block_noise(model.model, model.model_options)
            multiple = model.model.diffusion_model.patch_size if flux else 1
            pixels = cell_pixels(model.model)
        if latent is not None:
            samples = latent["samples"] if model is None else fit_latent(model, latent)
            rows, columns = samples.shape[-2:]
        else:
            rows, columns = height // pixels, width // pixels
        settings = Settings(
            autoregressive_order, rolling_window_size, rolling_overlap, attention_persistence, draft, lookahead
        )
        plan = settings.plan(rows, columns, steps, multiple, pixels)
        text = str(plan)
        if plan.alone:
            text = f"One block: the window covers the canvas, so this is ordinary sampling.\n{text}"
        elif model is not None and not flux:
            text = f"{plan_of_windows(plan, model.model.diffusion_model)}\n{why_not}, so it runs in windows."
        picture = numpy.asarray(plan_picture(plan), dtype=numpy.float32) / 255
        return torch.from_numpy(picture)[None], text
