"""The Flux-Dev node's second way: a folder in diffusers' layout, or the hub, through the library's own pipeline."""

from __future__ import annotations

from typing import Any

import comfy.latent_formats
import comfy.model_management as management
import comfy.model_patcher
import comfy.utils
import latent_preview
import torch
from einops import rearrange

from .flux_files import NOWHERE, REPOSITORY
from .notes import Notes
from .settings import Settings

NEEDED = ("model_index.json", "scheduler/*", "text_encoder/*", "text_encoder_2/*", "tokenizer/*", "tokenizer_2/*",
          "transformer/*", "vae/*")  # fmt: skip


def from_hub(notes: Notes) -> str:
    """The folder of FLUX.1-dev in the hub's cache; a download, with progress, if it isn't there. FileNotFoundError."""
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise FileNotFoundError(NOWHERE) from None
    try:
        return snapshot_download(REPOSITORY, allow_patterns=list(NEEDED), local_files_only=True)
    except Exception:  # not in the cache, or not whole
        notes.tell(f"{REPOSITORY} is looked for on Hugging Face, and downloaded: 34 GB.")
    try:
        return snapshot_download(REPOSITORY, allow_patterns=list(NEEDED), tqdm_class=_bar())
    except management.InterruptProcessingException:
        raise
    except Exception as error:  # no network, no login, licence not accepted, disk full: the hub has a page for each
        raise FileNotFoundError(f"{NOWHERE} (The hub: {_first_line(error)})") from error


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _bar() -> type:
    """A tqdm that shows on the node, too, and stops when the user cancels."""
    from tqdm.auto import tqdm

    class Bar(tqdm):
        def update(self, n: float | None = 1) -> bool | None:
            management.throw_exception_if_processing_interrupted()
            shown = super().update(n)
            if self.total:
                node = getattr(self, "node", None)
                if node is None or node.total != self.total:
                    self.node = node = comfy.utils.ProgressBar(self.total)
                node.update_absolute(self.n, self.total)
            return shown

    return Bar


def open_pipeline(folder: str) -> Any:
    """A pipeline for a folder, rolled, on the CPU: with `draw_latent`, all that this room knows of the pipeline's."""
    try:
        from ..loading import load
        from ..pipeline import roll
    except ImportError as error:
        raise ImportError(
            f"A folder in diffusers' layout needs diffusers, transformers and accelerate ({error}): "
            "install the pack's requirements.txt into ComfyUI's Python."
        ) from error
    return roll(load(folder, dtype=torch.bfloat16, device="cpu"))


def draw_latent(rolled: Any, settings: Settings, on_tick: Any, **arguments: Any) -> torch.Tensor:
    """Packed latents (B, tokens, 64) of the library's pipeline for the node's values."""
    return rolled(
        output_type="latent",
        order=settings.order,
        window=settings.window,
        overlap=settings.overlap,
        attention_persistence=settings.persistence,
        draft=None if settings.draft < 0 else settings.draft,
        lookahead="auto" if settings.lookahead < 0 else settings.lookahead,
        context_noise=settings.context_noise or None,
        extrapolation=settings.extrapolation,
        memory_tokens=settings.memory_cap or None,
        generator=torch.Generator("cpu").manual_seed(settings.seed),
        on_tick=on_tick,
        **arguments,
    ).images


class LibraryPipeline:
    """A pipeline that stays loaded on the device that ComfyUI gives it, and goes when ComfyUI needs the room."""

    def __init__(self, folder: str, offload: bool):
        self.offload, self.device = offload, management.get_torch_device()
        self.rolled = open_pipeline(folder)
        self.pipeline = self.rolled.pipe
        modules = {k: v for k, v in self.pipeline.components.items() if isinstance(v, torch.nn.Module)}
        self.patcher = comfy.model_patcher.ModelPatcher(
            torch.nn.ModuleDict(modules), load_device=self.device, offload_device=torch.device("cpu")
        )
        if self.offloads:
            self.pipeline.enable_model_cpu_offload(device=self.device)
        self.pipeline.set_progress_bar_config(disable=not comfy.utils.PROGRESS_BAR_ENABLED)

    @property
    def offloads(self) -> bool:
        return self.offload and self.device.type != "cpu"

    def sample(self, settings: Settings, prompt: str, negative_prompt: str, width: int, height: int, steps: int,
               cfg: float) -> tuple[dict, torch.Tensor]:  # fmt: skip
        """LATENT and IMAGE."""
        if self.offloads:  # the largest part alone is on the device at a time
            largest = max(sum(p.nbytes for p in part.parameters()) for part in self.patcher.model.values())
            management.free_memory(largest * 1.3, self.device)
        elif self.device.type != "cpu":
            management.load_models_gpu([self.patcher], force_full_load=True)
        try:
            packed = draw_latent(
                self.rolled, settings, _reporter(), prompt=prompt, negative_prompt=negative_prompt or None,
                width=width, height=height, num_inference_steps=steps, cfg=cfg,
            )  # fmt: skip
            canvas = rearrange(packed, "b (h w) (c p q) -> b c (h p) (w q)", h=height // 16, p=2, q=2)
            vae = self.pipeline.vae
            scaled = canvas / vae.config.scaling_factor + vae.config.shift_factor
            with torch.no_grad():
                decoded = vae.decode(scaled.to(vae.dtype), return_dict=False)[0]
            image = self.pipeline.image_processor.postprocess(decoded, output_type="pt")
        finally:
            self.pipeline.maybe_free_model_hooks()
        latent = comfy.latent_formats.Flux().process_out(canvas.float().cpu())
        return {"samples": latent}, image.movedim(1, -1).float().cpu()


def _reporter() -> Any:
    """A callback for each tick: progress, preview and interruption, as KSampler has them."""
    previewer = latent_preview.get_previewer(management.get_torch_device(), comfy.latent_formats.Flux())
    bar: list[Any] = []

    def report(tick: Any) -> None:
        management.throw_exception_if_processing_interrupted()
        if not bar:
            bar.append(comfy.utils.ProgressBar(tick.total))
        picture = previewer.decode_latent_to_preview_image("JPEG", tick.canvas.float()) if previewer else None
        bar[0].update_absolute(tick.number + 1, tick.total, picture)

    return report
