"""RollingFluxPipeline: diffusers' FluxPipeline with an order, a rolling window and memory."""

# Annotations are objects here, not strings: older releases of diffusers read those of __init__ as they are.
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Optional, Union

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, FlowMatchEulerDiscreteScheduler, FluxPipeline
from diffusers.models import FluxTransformer2DModel
from diffusers.pipelines.flux.pipeline_output import FluxPipelineOutput
from diffusers.utils import logging, torch_utils
from torch import Tensor
from transformers import (
    CLIPImageProcessor,
    CLIPTextModel,
    CLIPTokenizer,
    CLIPVisionModelWithProjection,
    T5EncoderModel,
    T5TokenizerFast,  # pyright: ignore[reportAttributeAccessIssue] (transformers 5 makes it up when asked)
)

from ..core.rollout import Frame
from ..defaults import Card, plan_for
from ..models.denoiser import PATCH, FluxDenoiser, pack, unpack
from ..models.flux import RollingFluxTransformer2DModel
from .conditions import Prompt, encode_images, encode_prompts
from .guidance import decide
from .run import Branch, Run
from .schedulers import choose, prepare
from .space import OutOfMemory, out_of_memory, place_memory

IMAGES = "ip_adapter_image_embeds"
logger = logging.get_logger(__name__)


class RollingFluxPipeline(FluxPipeline):
    """FluxPipeline, drawing in an order. `rolling` holds the model's card; see `Card`.

    A stock transformer is turned into a rolling one in place: no weight is copied, and FluxPipeline can go on using it.
    """

    def __init__(
        self,
        scheduler: FlowMatchEulerDiscreteScheduler,
        vae: Union[AutoencoderKL, AutoencoderTiny],  # noqa: UP007
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        text_encoder_2: T5EncoderModel,
        tokenizer_2: T5TokenizerFast,
        transformer: Union[FluxTransformer2DModel, RollingFluxTransformer2DModel],  # noqa: UP007
        image_encoder: CLIPVisionModelWithProjection = None,  # type: ignore
        feature_extractor: CLIPImageProcessor = None,  # type: ignore
        rolling: Optional[dict] = None,  # noqa: UP045
    ):
        stock: Any = super().__init__
        stock(
            scheduler=scheduler,
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            text_encoder_2=text_encoder_2,
            tokenizer_2=tokenizer_2,
            transformer=transformer,
            image_encoder=image_encoder,
            feature_extractor=feature_extractor,
        )
        self.card = Card.of(rolling)
        self.register_to_config(rolling=rolling)
        self.default_sample_size = self.card.size // self.vae_scale_factor
        self._become_rolling()

    def register_modules(self, **kwargs: Any) -> None:
        """As in diffusers, but the transformer is recorded as the stock class, which FluxPipeline can read."""
        super().register_modules(**kwargs)
        if isinstance(kwargs.get("transformer"), RollingFluxTransformer2DModel):
            self.register_to_config(transformer=("diffusers", "FluxTransformer2DModel"))

    def to_json_string(self) -> str:
        """The config; a folder that is saved with it is a FluxPipeline's, with a card."""
        entries = json.loads(super().to_json_string())
        if entries.get("rolling") is None:
            entries.pop("rolling", None)
        return json.dumps(entries | {"_class_name": "FluxPipeline"}, indent=2, sort_keys=True) + "\n"

    def _become_rolling(self) -> None:
        transformer = getattr(self, "transformer", None)
        if transformer is not None:
            inner = getattr(transformer, "_orig_mod", transformer)  # torch.compile's wrapper
            RollingFluxTransformer2DModel.from_stock(inner)

    @torch.no_grad()
    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        prompt: str | list[str] | None = None,
        prompt_2: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None,
        negative_prompt_2: str | list[str] | None = None,
        true_cfg_scale: float | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        sigmas: list[float] | None = None,
        guidance_scale: float | None = None,
        num_images_per_prompt: int | None = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        ip_adapter_image: Any = None,
        ip_adapter_image_embeds: list[Tensor] | None = None,
        negative_ip_adapter_image: Any = None,
        negative_ip_adapter_image_embeds: list[Tensor] | None = None,
        negative_prompt_embeds: Tensor | None = None,
        negative_pooled_prompt_embeds: Tensor | None = None,
        output_type: str | None = "pil",
        return_dict: bool = True,
        joint_attention_kwargs: dict[str, Any] | None = None,
        callback_on_step_end: Callable[..., Any] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        max_sequence_length: int | None = None,
        *,
        order: str = "top-to-bottom",
        window: int | None = None,
        overlap: int | None = None,
        attention_persistence: float = 1.0,
        draft: int | None = None,
        lookahead: int | str | None = "auto",
        lag: int | str | None = None,
        cfg: float | None = None,
        sampler: str | None = None,
        scheduler_sigmas: str | None = None,
        text_level: str | None = None,
        context_noise: float | None = None,
        memory_tokens: int | None = None,
        memory_device: torch.device | str | None = None,
        on_frame: Callable[[Frame], object] | None = None,
    ) -> FluxPipelineOutput | tuple:
        """FluxPipeline's arguments, with its meanings; what is None comes from the model's card. Beyond them:

        order: which part is drawn first, one of rolling_diffusion.ORDERS. window, overlap: cells (of 8 pixels) that are
            in motion, and by how much fewer the window advances; multiples of 2.
        lag: ticks from one block's start to the next one's; 0 is FluxPipeline, "autoregressive" waits for the
            predecessor to be finished, None fills the window. With Heun a step is two ticks.
        draft: first steps that all blocks take together. lookahead: cells ahead that waiting blocks are seen; None for
            the whole canvas, 0 for none, "auto" for the whole canvas up to the model's native size, else one window.
        attention_persistence: attention weight that finished blocks keep per block of distance; 0 is no memory.
        cfg: one number for guidance, in place of guidance_scale and true_cfg_scale: see docs/flux.md.
        sampler, scheduler_sigmas: names in SAMPLERS and SPACINGS, in place of the pipeline's scheduler.
        text_level, context_noise: see Card. memory_tokens: most tokens attended to in memory. memory_device: where they
            are kept; None for the GPU if they fit and nothing is offloaded, else the CPU.
        on_frame: called in each tick with a rolling_diffusion.Frame.

        callback_on_step_end is called once a tick, with the whole canvas as latents; changes act on the blocks in
        motion and on those that wait.
        """
        steps = len(sigmas) if sigmas is not None else num_inference_steps or self.card.steps
        if not isinstance(steps, int) or steps < 1:
            raise ValueError(f"num_inference_steps is {steps}, and must be a whole number of at least 1")
        max_sequence_length = max_sequence_length or self.card.max_sequence_length
        height = int(height or self.default_sample_size * self.vae_scale_factor)
        width = int(width or self.default_sample_size * self.vae_scale_factor)
        self.check_inputs(
            prompt,
            prompt_2,
            height,
            width,
            negative_prompt=negative_prompt,
            negative_prompt_2=negative_prompt_2,
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
            pooled_prompt_embeds=pooled_prompt_embeds,
            negative_pooled_prompt_embeds=negative_pooled_prompt_embeds,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
            max_sequence_length=max_sequence_length,
        )
        self._become_rolling()
        device = self._execution_device
        batch = len(prompt_embeds) if prompt_embeds is not None else 1 if isinstance(prompt, str) else len(prompt or ())
        images = batch * (num_images_per_prompt or 1)
        positive = Prompt(prompt, prompt_2, prompt_embeds, pooled_prompt_embeds)
        negative = Prompt(negative_prompt, negative_prompt_2, negative_prompt_embeds, negative_pooled_prompt_embeds)
        distilled = self.transformer.config.guidance_embeds
        guidance = decide(self.card, distilled, negative.says, cfg, guidance_scale, true_cfg_scale)
        if guidance.fills_in and not negative.given:
            negative = Prompt("")
        if negative.says and guidance.scale <= 1:
            logger.warning("The negative prompt has no effect unless cfg, or true_cfg_scale, is above 1.")
        callback = callback_on_step_end, callback_on_step_end_tensor_inputs
        self._guidance_scale = guidance.embedded
        self._joint_attention_kwargs = attention = dict(joint_attention_kwargs or {})
        self._current_timestep, self._interrupt = None, False

        encode = {
            "device": device,
            "num_images_per_prompt": num_images_per_prompt,
            "max_sequence_length": max_sequence_length,
            "lora_scale": attention.get("scale"),
        }
        texts = encode_prompts(self, positive, negative, guidance, batch, encode)
        looks = encode_images(
            self,
            (ip_adapter_image, negative_ip_adapter_image),
            (ip_adapter_image_embeds, negative_ip_adapter_image_embeds),
            (width, height),
            images,
            device,
        )
        cells = [PATCH * (n // (self.vae_scale_factor * PATCH)) for n in (height, width)]
        channels, dtype = self.transformer.config.in_channels // 4, texts[0][0].dtype
        prepare_latents: Any = self.prepare_latents
        packed, _ = prepare_latents(images, channels, height, width, dtype, device, generator, latents)
        if packed.shape != (images, cells[0] * cells[1] // PATCH**2, channels * 4):
            raise ValueError(
                f"latents has shape {tuple(packed.shape)}, but {images} images of {width} × {height} pixels need "
                f"{(images, cells[0] * cells[1] // PATCH**2, channels * 4)}, packed as FluxPipeline packs them"
            )
        scheduler, levels = choose(self.scheduler, sampler, scheduler_sigmas)
        scheduler, steps = prepare(scheduler, levels, steps, sigmas, packed.shape[1], device)
        first = generator[0] if isinstance(generator, list) else generator
        seed = 0 if first is None else first.initial_seed()
        plan = plan_for(
            self.card,
            cells[0],
            cells[1],
            steps,
            order=order,
            window=window,
            overlap=overlap,
            persistence=attention_persistence,
            draft=draft,
            lookahead=lookahead,
            lag=lag,
            seed=seed,
            multiple=PATCH,
            calls_per_step=scheduler.order,
        )
        self._num_timesteps = plan.ticks
        cap = self.card.memory_tokens if memory_tokens is None else memory_tokens
        offloaded = bool(getattr(self, "_all_hooks", None))
        keep_at = memory_device or place_memory(
            self.transformer, offloaded, plan, cap, images * len(texts), dtype, device
        )
        branches = [
            FluxDenoiser(
                Branch(self.transformer, name),
                *text,
                joint_attention_kwargs=attention if look is None else {**attention, IMAGES: look},
                guidance=guidance.embedded,
                rule=replace(plan.rule, cap=cap),
                memory_device=keep_at,
                text_level=text_level or self.card.text_level,
                context_noise=self.card.context_noise if context_noise is None else context_noise,
                seed=seed,
            )
            for name, text, look in zip(("cond", "uncond"), texts, looks)
        ]
        image = None
        progress_bar: Any = self.progress_bar
        with progress_bar(total=steps if plan.alone else plan.ticks) as bar:
            canvas = unpack(packed, *cells)
            run = Run(self, plan, scheduler, guidance, branches, texts[0][0], canvas, bar, *callback)
            try:
                image = self._decode(run.latents(on_frame), output_type)
            except OutOfMemory:
                pass  # raised below, where no frame of the run is alive and holds what it held
            finally:
                run.clear()
                self._current_timestep = None
        self.maybe_free_model_hooks()
        if image is None:
            raise out_of_memory(plan, keep_at)
        return FluxPipelineOutput(images=image) if return_dict else (image,)

    def _decode(self, canvas: Tensor, output_type: Any) -> Any:
        """Latents (B, C, h, w) as FluxPipeline gives them: packed, or decoded."""
        if output_type == "latent":
            return pack(canvas)
        canvas = canvas / self.vae.config.scaling_factor + self.vae.config.shift_factor
        placed: Any = getattr(torch_utils, "get_module_execution_device", None)  # older releases need not move anything
        canvas = canvas if placed is None else canvas.to(placed(self.vae))
        decoded = self.vae.decode(canvas, return_dict=False)[0]
        return self.image_processor.postprocess(decoded, output_type=output_type)

    @torch.no_grad()
    def preview(self, frame: Frame | Tensor) -> Any:
        """A PIL picture of the first image of a frame, or of latents (B, C, h, w), as decoded by the VAE."""
        canvas = frame if isinstance(frame, Tensor) else frame.canvas
        return self._decode(canvas[:1], "pil")[0]
