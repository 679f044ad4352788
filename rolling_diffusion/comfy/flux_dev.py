"""The Flux-Dev node: from a prompt to a picture on the library's own pipeline."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import comfy.latent_formats
import comfy.model_management as management
import comfy.model_patcher
import comfy.utils
import folder_paths
import latent_preview
import torch
from einops import rearrange

from . import inputs
from .canvas import log

REPOSITORY = "black-forest-labs/FLUX.1-dev"
EMBEDDED, FLUX_DEV = "embedded", "FLUX.1-dev"
FOLDER = Path(__file__).resolve().parents[1] / "embedded"
WEIGHTS = (".safetensors", ".sft", ".gguf")


@dataclass(frozen=True)
class Found:
    """Where a pipeline's weights are: a model folder or a repository, or one file with what lies beside it."""

    source: str
    single_file: bool = False
    parts: dict[str, str] = field(default_factory=dict)  # clip, t5, vae: files of ComfyUI's folders


def find_flux_dev() -> Found:
    """ComfyUI's model folders first, then the hub (its cache before a download, as the hub's own client does)."""
    for root in _folders("diffusers"):
        for index in sorted(Path(root).glob("*/model_index.json")):
            if _named(index.parent.name):
                return Found(str(index.parent))
    for kind in ("checkpoints", "diffusion_models"):
        for name in _files(kind):
            if _named(name) and name.endswith(WEIGHTS):
                parts = {
                    "clip": _first("text_encoders", "clip_l"),
                    "t5": _first("text_encoders", "t5xxl"),
                    "vae": _first("vae", "ae.") or _first("vae", "flux"),
                }
                path = folder_paths.get_full_path(kind, name)
                return Found(str(path), True, {k: v for k, v in parts.items() if v})
    return Found(REPOSITORY)


def _named(name: str) -> bool:
    """Is this FLUX.1-dev's own, and not one of its relatives (Fill, Kontext, Canny, …), which need other pipelines?"""
    plain = name.lower().replace(".", "").replace("_", "-")
    relatives = ("fill", "kontext", "canny", "depth", "redux", "controlnet", "lora", "vae")
    return "flux1-dev" in plain and not any(word in plain for word in relatives)


def _folders(kind: str) -> list[str]:
    return folder_paths.get_folder_paths(kind) if kind in folder_paths.folder_names_and_paths else []


def _files(kind: str) -> list[str]:
    return folder_paths.get_filename_list(kind) if kind in folder_paths.folder_names_and_paths else []


def _first(kind: str, start: str) -> str | None:
    for name in _files(kind):
        if Path(name).name.lower().startswith(start):
            return folder_paths.get_full_path(kind, name)
    return None


class FluxDevAutoRegressiveRollingDiffusionSampler:
    """Prompt in, LATENT and IMAGE out."""

    CATEGORY = "sampling/custom_sampling"
    FUNCTION = "sample"
    RETURN_TYPES = ("LATENT", "IMAGE")
    RETURN_NAMES = ("latent", "image")
    OUTPUT_TOOLTIPS = ("The latent, for VAE Decode with the Flux VAE.", "The finished picture.")
    DESCRIPTION = (
        "From a prompt to a picture with FLUX.1-dev, generated in an order. Finds the weights in ComfyUI's model "
        "folders or the Hugging Face cache. The embedded model runs at once, on any machine."
    )
    SEARCH_ALIASES = ("flux", "flux-dev", "autoregressive", "rolling", "text to image")

    def __init__(self):
        self.loaded: tuple[tuple, Any, Any] | None = None  # what for, the pipeline, and what ComfyUI manages of it

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        size = {"default": 512, "min": 256, "max": 1024, "step": 64, "tooltip": "Pixels."}
        return {
            "required": {
                "prompt": ("STRING", {"multiline": True, "default": "A beautiful landscape with mountains and a lake",
                                      "tooltip": "What the picture is to show."}),
                "negative_prompt": ("STRING", {"multiline": True, "default": "blurry, low quality, distorted",
                                               "tooltip": "What the picture is not to show."}),
                "width": ("INT", size),
                "height": ("INT", size),
                "seed": inputs.SEED,
                "steps": ("INT", {"default": 20, "min": 1, "max": 100, "tooltip": "Steps that every block takes."}),
                "cfg": ("FLOAT", {"default": 7.0, "min": 0.0, "max": 20.0, "step": 0.1, "tooltip": "Guidance."}),
                "autoregressive_order": inputs.ORDER,
                "rolling_window_size": inputs.WINDOW,
                "rolling_overlap": inputs.OVERLAP,
                "attention_persistence": inputs.PERSISTENCE,
                "enable_cpu_offload": (["True", "False"], {
                    "default": "True", "tooltip": "Keep on the GPU only the part of the model that is at work."}),
            },
            "optional": {
                "model": ([FLUX_DEV, EMBEDDED], {
                    "default": FLUX_DEV, "tooltip": "FLUX.1-dev, or the small model that ships with this pack."}),
                **inputs.EXTRAS,
            },
        }  # fmt: skip

    @classmethod
    def VALIDATE_INPUTS(cls, rolling_window_size=None, rolling_overlap=None, draft=None, steps=None):
        return inputs.problem(rolling_window_size, rolling_overlap, None, draft, steps, most_steps=100) or True

    def sample(self, prompt, negative_prompt, width, height, seed, steps, cfg, autoregressive_order,
               rolling_window_size, rolling_overlap, attention_persistence, enable_cpu_offload, model=FLUX_DEV,
               draft=-1, lookahead=-1, context_noise=0.0, memory_cap=0):  # fmt: skip
        found = _embedded() if model == EMBEDDED else find_flux_dev()
        pipeline = self._pipeline(found, enable_cpu_offload == "True")
        try:
            packed = pipeline(
                prompt=prompt,
                negative_prompt=negative_prompt or None,
                width=width,
                height=height,
                num_inference_steps=steps,
                cfg=cfg,
                generator=torch.Generator("cpu").manual_seed(seed),
                output_type="latent",
                order=autoregressive_order,
                window=rolling_window_size,
                overlap=rolling_overlap,
                attention_persistence=attention_persistence,
                draft=None if draft < 0 else draft,
                lookahead=None if lookahead < 0 else lookahead,
                context_noise=context_noise or None,
                memory_tokens=memory_cap or None,
                on_frame=_reporter(),
            ).images
            canvas = rearrange(packed, "b (h w) (c p q) -> b c (h p) (w q)", h=height // 16, p=2, q=2)
            vae = pipeline.vae
            scaled = canvas / vae.config.scaling_factor + vae.config.shift_factor
            with torch.no_grad():
                decoded = vae.decode(scaled.to(vae.dtype), return_dict=False)[0]
            image = pipeline.image_processor.postprocess(decoded, output_type="pt")
        finally:
            pipeline.maybe_free_model_hooks()
        latent = comfy.latent_formats.Flux().process_out(canvas.float().cpu())
        return {"samples": latent}, image.movedim(1, -1).float().cpu()

    def _pipeline(self, found: Found, offload: bool) -> Any:
        """The pipeline, loaded once, on the device that ComfyUI gives it. It goes when ComfyUI drops this node."""
        key = found.source, offload
        if self.loaded is None or self.loaded[0] != key:
            self.loaded = None  # the old one first: two would not fit
            pipeline = load_pipeline(found)
            holder = torch.nn.ModuleDict(
                {k: v for k, v in pipeline.components.items() if isinstance(v, torch.nn.Module)}
            )
            device = management.get_torch_device()
            patcher = comfy.model_patcher.ModelPatcher(holder, load_device=device, offload_device=torch.device("cpu"))
            if offload and device.type != "cpu":
                pipeline.enable_model_cpu_offload(device=device)
            pipeline.set_progress_bar_config(disable=not comfy.utils.PROGRESS_BAR_ENABLED)
            self.loaded = key, pipeline, patcher
        _, pipeline, patcher = self.loaded
        if management.get_torch_device().type != "cpu":
            if offload:  # the largest part alone is on the device at a time
                largest = max(_bytes(part) for part in patcher.model.values())
                management.free_memory(largest * 1.3, patcher.load_device)
            else:
                management.load_models_gpu([patcher], force_full_load=True)
        return pipeline


def _bytes(module: torch.nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters())


def _embedded() -> Found:
    if not (FOLDER / "model_index.json").is_file():
        raise FileNotFoundError(
            f"The embedded model is missing: {FOLDER} has no model_index.json. Install the pack again."
        )
    return Found(str(FOLDER))


def load_pipeline(found: Found) -> Any:
    """The library's pipeline; errors of the hub or of the files in one sentence each, as the library gives them."""
    try:
        from ..pipeline import RollingFluxPipeline
    except ImportError as error:
        raise ImportError(
            f"The Flux-Dev node needs diffusers, transformers and accelerate ({error}): "
            "install the pack's requirements.txt into ComfyUI's Python."
        ) from error
    dtype = torch.float32 if found.source == str(FOLDER) else torch.bfloat16
    log.info("Rolling: loading the pipeline from %s", found.source)
    if found.single_file:
        return RollingFluxPipeline.from_single_file(found.source, torch_dtype=dtype)
    return RollingFluxPipeline.from_pretrained(found.source, torch_dtype=dtype)


def _reporter() -> Any:
    """A callback for the rollout's frames: progress, preview and interruption, as KSampler has them."""
    previewer = latent_preview.get_previewer(management.get_torch_device(), comfy.latent_formats.Flux())
    bar: list[Any] = []

    def report(frame: Any) -> None:
        management.throw_exception_if_processing_interrupted()
        if not bar:
            bar.append(comfy.utils.ProgressBar(frame.total))
        picture = previewer.decode_latent_to_preview_image("JPEG", frame.canvas.float()) if previewer else None
        bar[0].update_absolute(frame.tick + 1, frame.total, picture)

    return report
