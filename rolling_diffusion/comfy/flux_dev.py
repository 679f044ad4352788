"""The Flux-Dev node: from a prompt to a picture, on ComfyUI's own loaders, memory management and samplers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import comfy.model_management as management
import comfy.model_sampling
import comfy.sample
import comfy.samplers
import comfy.utils
import latent_preview
import torch

from . import inputs
from .embedded import load as load_embedded
from .flux_files import Found, Parts, find_flux, fingerprint, load_parts
from .flux_library import LibraryPipeline, from_hub
from .guidance import is_distilled, make_guider
from .notes import Notes
from .sampler import Rolling
from .settings import Settings

EMBEDDED, FLUX_DEV = "embedded", "FLUX.1-dev"
MOST_TOKENS = 4096  # up to which FLUX.1-dev's schedule shifts towards noise; beyond, the last step would do everything


class FluxDevAutoRegressiveRollingDiffusionSampler(inputs.Early):
    """Prompt in, LATENT and IMAGE out."""

    CATEGORY = "sampling/custom_sampling"
    FUNCTION = "sample"
    RETURN_TYPES = ("LATENT", "IMAGE")
    RETURN_NAMES = ("latent", "image")
    OUTPUT_TOOLTIPS = ("The latent, for VAE Decode with the Flux VAE.", "The finished picture.")
    DESCRIPTION = (
        "From a prompt to a picture with FLUX.1-dev, generated in an order. Takes the Flux files in ComfyUI's model "
        "folders, or a MODEL, CLIP and VAE that are loaded already. The embedded model runs at once, on any machine."
    )
    SEARCH_ALIASES = ("flux", "flux-dev", "autoregressive", "rolling", "ksampler", "text to image")

    def __init__(self):
        self.loaded: tuple[Any, Any] | None = None  # what for, and the parts or the pipeline

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        size = {
            "default": 512,
            "min": 256,
            "max": inputs.MOST_PIXELS,
            "step": 16,
            "tooltip": "Pixels. FLUX.1-dev was trained on up to 2 megapixels, the embedded model on 256×256.",
        }
        return {
            "required": {
                "prompt": ("STRING", {"multiline": True, "default": "A beautiful landscape with mountains and a lake",
                                      "tooltip": "What the picture is to show."}),
                "negative_prompt": ("STRING", {"multiline": True, "default": "blurry, low quality, distorted",
                                               "tooltip": "What the picture is not to show. With FLUX.1-dev it doubles "
                                               "the cost; left empty, the model's own guidance is used."}),
                "width": ("INT", size),
                "height": ("INT", size),
                "seed": inputs.SEED,
                "steps": ("INT", {"default": 20, "min": 1, "max": 100, "tooltip": "Steps that every block takes."}),
                "cfg": ("FLOAT", {"default": 7.0, "min": 0.0, "max": 20.0, "step": 0.1,
                                  "tooltip": "FLUX.1-dev without a negative prompt: its embedded guidance, 3.5 as a "
                                  "rule. With one: the weight of the difference between the two prompts; the embedded "
                                  "guidance stays 3.5. Undistilled models: classifier-free guidance, 2.5 for the "
                                  "embedded model."}),
                "autoregressive_order": inputs.ORDER,
                "rolling_window_size": inputs.WINDOW,
                "rolling_overlap": inputs.OVERLAP,
                "attention_persistence": inputs.PERSISTENCE,
                "enable_cpu_offload": (["True", "False"], {
                    "default": "True",
                    "tooltip": "True: only the part at work is on the GPU: text encoders, transformer, or autoencoder. "
                    "False: all three stay there, as far as they fit, and the next run starts sooner."}),
            },
            "optional": {
                "model": ([FLUX_DEV, EMBEDDED, *(found.name for found in find_flux())], {
                    "default": FLUX_DEV,
                    "tooltip": "FLUX.1-dev is the first that is found. The embedded model ships with this pack."}),
                **inputs.EXTRAS,  # in the order of saved workflows; what is newer comes behind
                "fit_window": ("BOOLEAN", {
                    "default": True,
                    "tooltip": "Where the window would cover the picture, so that nothing rolls, take half of it."}),
                "loaded_model": inputs.lazy("MODEL", "Takes this model instead: one with a LoRA, say."),
                "clip": inputs.lazy("CLIP", "Takes these text encoders instead."),
                "vae": inputs.lazy("VAE", "Takes this autoencoder instead."),
                **inputs.NEWER,
            },
        }  # fmt: skip

    @classmethod
    def IS_CHANGED(cls, **values):
        return fingerprint()

    def sample(self, prompt, negative_prompt, width, height, seed, steps, cfg, autoregressive_order,
               rolling_window_size, rolling_overlap, attention_persistence, enable_cpu_offload, model=FLUX_DEV,
               fit_window=True, draft=-1, lookahead=-1, context_noise=0.0, memory_cap=0, loaded_model=None, clip=None,
               vae=None, extrapolation=0.0):  # fmt: skip
        settings = Settings(autoregressive_order, rolling_window_size, rolling_overlap, attention_persistence,
                            draft, lookahead, context_noise, memory_cap, seed, extrapolation)  # fmt: skip
        notes, canvas = Notes(), (height // 8, width // 8)
        settings.plan(*canvas, steps, 2)  # refuses what cannot be planned, before anything is loaded
        if fit_window:
            settings = settings.fitted(*canvas, notes)
        offload = enable_cpu_offload == "True"
        try:
            found = None if loaded_model is not None or model == EMBEDDED else _choose(model, notes)
        except FileNotFoundError as error:
            notes.warn(str(error))  # the page hides the sentence of an error behind a button
            raise
        if found is not None and found.kind == "diffusers":
            pipeline = self._loaded((found, offload), lambda: LibraryPipeline(found.path, offload))
            return pipeline.sample(settings, prompt, negative_prompt, width, height, steps, cfg)
        given = {"model": loaded_model, "clip": clip, "vae": vae}
        need = tuple(name for name, part in given.items() if part is None)
        if model == EMBEDDED:
            parts = self._loaded(EMBEDDED, lambda: Parts(*load_embedded()))
        else:
            parts = self._loaded((found, need), lambda: load_parts(found, need))
        parts = Parts(**{**vars(parts), **{name: part for name, part in given.items() if part is not None}})
        own = loaded_model is None and model != EMBEDDED
        return _sample(parts, settings, notes, offload, own, prompt, negative_prompt, width, height, steps, cfg)

    def _loaded(self, key: Any, load: Callable[[], Any]) -> Any:
        """What was loaded for this key. It stays until another is asked for, or ComfyUI drops this node."""
        if self.loaded is None or self.loaded[0] != key:
            self.loaded = None  # the old one first: two would not fit
            self.loaded = key, load()
        return self.loaded[1]


def _choose(name: str, notes: Notes) -> Found:
    """The FLUX.1-dev of this name, or the first there is: files, a folder in diffusers' layout, the hub."""
    every = find_flux()
    if name != FLUX_DEV:
        every = [found for found in every if found.name == name]
        if not every:
            raise FileNotFoundError(f"{name} is no longer among ComfyUI's models: choose another.")
    found = every[0] if every else Found("hub", from_hub(notes), "diffusers")
    notes.tell(f"The model is {found.name}.")
    return found


def _sample(parts: Parts, settings: Settings, notes: Notes, offload: bool, own: bool, prompt: str,
            negative_prompt: str, width: int, height: int, steps: int, cfg: float) -> tuple:  # fmt: skip
    """LATENT and IMAGE. own: whether the schedule is the node's to choose, as for files that it loaded itself."""
    model, clip, vae = parts.model, parts.clip, parts.vae
    if not offload:  # as far as they fit: ComfyUI takes off what doesn't
        management.load_models_gpu([model, clip.patcher, vae.patcher])
    positive, negative = (clip.encode_from_tokens_scheduled(clip.tokenize(text)) for text in (prompt, negative_prompt))
    if offload:
        _release(clip.patcher)
    if own and is_distilled(model):
        model = _flux_schedule(model, width, height)
    guider = make_guider(model, positive, negative, cfg, refuses=bool(negative_prompt.strip()))
    latent = torch.zeros(1, 16, height // 8, width // 8, device=management.intermediate_device())
    latent = comfy.sample.fix_empty_latent_channels(model, latent)
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", steps)
    samples = guider.sample(
        comfy.sample.prepare_noise(latent, settings.seed),
        latent,
        Rolling(comfy.samplers.sampler_object("euler"), settings, notes),
        sigmas,
        callback=latent_preview.prepare_callback(model, steps),
        disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
        seed=settings.seed,
    ).to(management.intermediate_device())
    if offload:
        _release(model)
    image = vae.decode(samples)
    return {"samples": samples}, image.flatten(0, 1) if image.ndim == 5 else image  # 5: autoencoders for video


def _flux_schedule(model: Any, width: int, height: int) -> Any:
    """The model with FLUX.1-dev's shift for this size, as its makers sample it: 0.5 at 256 tokens, 1.15 at most."""

    class Sampling(comfy.model_sampling.ModelSamplingFlux, comfy.model_sampling.CONST):
        pass

    sampling = Sampling(model.model.model_config)
    sampling.set_parameters(shift=0.5 + 0.65 * (min(width * height // 256, MOST_TOKENS) - 256) / (MOST_TOKENS - 256))
    model = model.clone()
    model.add_object_patch("model_sampling", sampling)
    return model


def _release(patcher: Any) -> None:
    """Take this model off its device, and leave there what is other nodes'."""
    loaded = management.current_loaded_models
    others = [each for each in loaded if each.model is None or not each.model.is_clone(patcher)]
    management.free_memory(1e30, patcher.load_device, keep_loaded=others)
