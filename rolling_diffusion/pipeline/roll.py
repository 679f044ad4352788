"""roll(pipe): a pipeline of diffusers, drawing in an order. The pipeline stays what it was."""

from __future__ import annotations

import copy
import difflib
import inspect
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from torch import Tensor

from ..core.order import whole
from ..core.plan import Plan
from ..defaults import Card, check_text_level, plan_for
from ..models.call import swapped, unwrapped
from ..models.registry import family_of
from .guidance import decide
from .run import Run, Scheduler, Tick, Transformer
from .schedulers import choose, take_levels
from .space import OutOfMemory, out_of_memory, place_memory

# What is said to a pipeline, and asked of it, while it is called: of the user's own, by a stop button or a step cache.
LIVE = ("_interrupt", "_current_timestep")


def roll(pipe: Any, card: Card | Mapping[str, Any] | None = None) -> Rolling:
    """A diffusers pipeline that draws in an order: roll(pipe)("a lighthouse", order="spiral-out", window=64).images[0]

    pipe: a pipeline around one of the transformers in rolling_diffusion.FAMILIES: FLUX.1 (also image-to-image,
        inpainting, Fill, Control, ControlNet, Kontext), FLUX.2, Stable Diffusion 3. It is not changed.
    card: what the model should be sampled with when the caller does not say; None for the one in the model's folder.

    ValueError, of one sentence, for a pipeline that cannot roll.
    """
    return Rolling(pipe, card)


class Rolling:
    """What `roll` gives. Called with the pipeline's own arguments, and those of rolling; see `__call__`."""

    def __init__(self, pipe: Any, card: Card | Mapping[str, Any] | None = None):
        if not hasattr(pipe, "transformer") or not hasattr(pipe, "scheduler"):
            raise ValueError(f"{type(pipe).__name__} has no transformer and scheduler that blocks could share")
        self.pipe = pipe
        self.family = family_of(pipe.transformer)
        self.parameters = {n: p for n, p in inspect.signature(type(pipe).__call__).parameters.items() if n != "self"}
        found = card_of(pipe) if card is None else card
        self.has_card = found is not None
        self.card = found if isinstance(found, Card) else Card.of(self._defaults() if found is None else found)

    @torch.no_grad()
    def __call__(
        self,
        *args: Any,
        order: Any = "top-to-bottom",
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
        extrapolation: float | None = None,
        memory_tokens: int | None = None,
        memory_device: torch.device | str | None = None,
        on_tick: Callable[[Tick], object] | None = None,
        **options: Any,
    ) -> Any:
        """The pipeline's own arguments, with its meanings; what it returns is returned. Beyond them:

        order: which part is drawn first: one of rolling_diffusion.ORDERS, or an order of your own (see make_plan). Of
            several pictures in one call, all take the same; "difficulty" goes by their mean.
        window, overlap: cells (of 8 pixels) that are in motion, and by how much fewer the window advances.
        attention_persistence: attention weight that finished blocks keep per block of distance; 0 is no memory.
        draft: first steps that all blocks take together.
        lookahead: cells ahead that waiting blocks are seen; None for the whole canvas, 0 for none, "auto" for the whole
            canvas up to the model's native size, else one window.
        lag: ticks from one block's start to the next one's; 0 is the pipeline itself, "autoregressive" waits for the
            predecessor to be finished, None fills the window.
        cfg: one number for guidance, in place of guidance_scale and true_cfg_scale: see docs/flux.md.
        sampler, scheduler_sigmas: names in SAMPLERS and SPACINGS, in place of the pipeline's scheduler.
        text_level, context_noise: see Card.
        extrapolation: share of its noise that a waiting block is remembered without; 0: as the draft left it.
        memory_tokens: most tokens attended to in memory. memory_device: where they are kept; None for the GPU if they
            fit and nothing is offloaded, else the CPU.
        on_tick: called in each tick with a rolling_diffusion.Tick.

        What is None comes from the model's card. callback_on_step_end is called once a tick, with the whole canvas;
        what it changes acts. The pipeline itself, its scheduler, hooks and, with a generator, the default random state
        are as they were, however the call ends. ValueError, of one sentence, for what does not fit together.
        """
        said = self._bound(args, options)
        pipe, card, family = self.pipe, self.card, self.family
        model = unwrapped(pipe.transformer)
        refused = family.refusal(model) or _refusal(model)
        text_level = card.text_level if text_level is None else text_level
        noise = card.context_noise if context_noise is None else context_noise
        check_levels(text_level, noise)
        guidance, words = decide(self.card, self.parameters, said, cfg, _distilled(model))
        said |= words
        self._complete(said)
        generator = said.get("generator")
        given = generator if isinstance(generator, (list, tuple)) else [] if generator is None else [generator]
        seeds = [g.initial_seed() for g in given] or None

        def make_plan(height: int, width: int, calls: int, each: int) -> Plan:
            plan = plan_for(
                card,
                height,
                width,
                -(-calls // each),
                order=order,
                window=window,
                overlap=overlap,
                persistence=attention_persistence,
                draft=draft,
                lookahead=lookahead,
                lag=lag,
                seed=seeds[0] if seeds else torch.initial_seed(),
                multiple=family.patch,
                extrapolation=extrapolation,
                calls_per_step=each,
            )
            if not plan.alone:
                for sentence in (refused, _share_of_steps(said)):
                    if sentence:
                        raise ValueError(sentence)
            return plan

        cap = card.reach if memory_tokens is None else whole("memory_tokens", memory_tokens, 0)
        offloaded = bool(getattr(pipe, "_all_hooks", None))
        kept: list[Any] = [memory_device]

        def place(plan: Plan, states: Tensor) -> torch.device | None:
            if memory_device is None:
                kept[0] = place_memory(model, offloaded, plan, cap, len(states), pipe.transformer.dtype, states.device)
            return kept[0]

        run = Run(
            pipe,
            family,
            make_plan,
            guidance,
            seeds=seeds,
            named=sampler is not None or scheduler_sigmas is not None,
            text_level=text_level,
            context_noise=noise,
            cap=cap,
            place_memory=place,
            on_tick=on_tick,
        )
        stepper, levels = choose(copy.deepcopy(pipe.scheduler), sampler, scheduler_sigmas)
        adopt = None if stepper is levels else lambda source: take_levels(stepper, source, pipe._execution_device)
        limit = self._limit(said, run, lag)
        run.scheduler = Scheduler(run, stepper, levels, adopt, limit)
        stand_in, hooked = _stand_in(pipe, run), hasattr(model, "_diffusers_hook")
        try:
            with swapped((vars(pipe), name, None) for name in LIVE):
                return type(pipe).__call__(stand_in, **said)
        except OutOfMemory:
            if run._plan is None or run._plan.alone:
                raise
            plan = run._plan
        finally:
            run.clear()
            if not hooked:  # the pipeline leaves one, empty, for step caches
                vars(model).pop("_diffusers_hook", None)
        del run, stand_in  # no frame of the run is alive and holds what it held
        raise out_of_memory(plan, kept[0])

    def preview(self, tick: Tick) -> Any:
        """A PIL picture of the first image, as guessed in a tick, as the VAE decodes it."""
        cells = tick.canvas
        with torch.no_grad():
            pixels = self.family.decode(self.pipe, tick.latents[:1], *cells.shape[-2:])
        return self.pipe.image_processor.postprocess(pixels, output_type="pil")[0]

    def _defaults(self) -> dict[str, Any]:
        """What the pipeline itself draws with when nothing is said, as the entries of a card."""
        names = {"num_inference_steps": "steps", "max_sequence_length": "max_sequence_length"}
        values = {ours: self.parameters[name].default for name, ours in names.items() if name in self.parameters}
        if hasattr(self.pipe, "default_sample_size"):
            values["size"] = self.pipe.default_sample_size * self.pipe.vae_scale_factor
        return {name: value for name, value in values.items() if isinstance(value, int) and value > 0}

    def _bound(self, args: tuple, options: dict[str, Any]) -> dict[str, Any]:
        """The pipeline's arguments by name; ValueError that names one it does not take."""
        names = list(self.parameters)
        unknown = [name for name in options if name not in names]
        if unknown:
            ours = [n for n, p in inspect.signature(Rolling.__call__).parameters.items() if p.kind is p.KEYWORD_ONLY]
            close = difflib.get_close_matches(unknown[0], [*names, *ours], n=1)
            near = f" (did you mean {close[0]!r}?)" if close else ""
            raise ValueError(
                f"neither {type(self.pipe).__name__} nor rolling takes an argument {unknown[0]!r}{near}: the pipeline "
                f"takes {', '.join(names)}; rolling takes {', '.join(ours)}"
            )
        if len(args) > len(names):
            raise ValueError(f"{type(self.pipe).__name__} takes {len(names)} arguments at most, not {len(args)}")
        said = dict(zip(names, args))
        twice = [name for name in options if name in said]
        if twice:
            raise ValueError(f"{twice[0]} is given twice, by place and by name: give it once")
        steps = options.get("num_inference_steps", said.get("num_inference_steps"))
        if steps is not None and (isinstance(steps, bool) or not hasattr(steps, "__index__") or steps < 1):
            raise ValueError(f"num_inference_steps is {steps}, and must be a whole number of at least 1")
        return said | options

    def _complete(self, said: dict[str, Any]) -> None:
        """What the card says and the caller did not. Without a card, the pipeline's own defaults stand."""
        negative, prompt = said.get("negative_prompt"), said.get("prompt")
        if isinstance(negative, str) and isinstance(prompt, list):
            said["negative_prompt"] = [negative] * len(prompt)
        if not self.has_card:
            return
        card = self.card
        for name, value in {
            "height": card.size,
            "width": card.size,
            "num_inference_steps": len(said["sigmas"]) if said.get("sigmas") is not None else card.steps,
            "max_sequence_length": card.max_sequence_length,
        }.items():
            if name in self.parameters and said.get(name) is None:
                said[name] = value

    def _limit(self, said: Mapping[str, Any], run: Run, lag: Any) -> Callable[[float], float]:
        """The shift of noise levels, stopped at the model's own limit when a canvas larger than that rolls.

        Beyond it nearly all steps would lie at full noise, and the picture would be one step. An ordinary call, of one
        block or at lag 0, keeps what the pipeline computes; so does a shift that was asked for.
        """

        def limit(mu: float) -> float:
            most = self.family.most_shift(run.scheduler.levels.config)
            if most is None or mu <= most or said.get("mu") is not None or lag == 0:
                return mu
            if not run.height:
                run.height, run.width = self._size(said)
            return mu if run.make_plan(run.height, run.width, 2, 1).alone else most

        return limit

    def _size(self, said: Mapping[str, Any]) -> tuple[int, int]:
        """Cells of the canvas, where a pipeline asks for its noise levels before it makes its latents."""
        pixels = self.pipe.vae_scale_factor * self.family.patch
        default = self.pipe.default_sample_size * self.pipe.vae_scale_factor
        sides = (int(said.get(name) or default) for name in ("height", "width"))
        height, width = (self.family.patch * (side // pixels) for side in sides)
        return height, width


def card_of(pipe: Any) -> Mapping[str, Any] | None:
    """The entries of the card in the folder, or in the hub's cache, that a pipeline was loaded from; None without."""
    name = pipe.config.get("_name_or_path") if hasattr(pipe, "config") else None
    if not name:
        return None
    index: Any = Path(name) / "model_index.json"
    if not index.is_file():
        try:
            index = try_to_load_from_cache(name, "model_index.json")
        except ValueError:  # not the name of a repository
            return None
    if not isinstance(index, (str, Path)):
        return None
    entries = json.loads(Path(index).read_text(encoding="utf-8"))
    return entries.get("rolling") if isinstance(entries, dict) else None


def _refusal(model: Any) -> str | None:
    """What makes a transformer answer for other tokens than it is asked."""
    registries = (getattr(module, "_diffusers_hook", None) for module in model.modules())
    if any(hook._is_stateful for registry in registries if registry for hook in registry.hooks.values()):
        return (
            "a step cache is enabled on the transformer, and would answer for tokens that it was not asked for: call "
            "transformer.disable_cache(), or roll with lag=0"
        )
    if getattr(model, "_parallel_config", None) is not None:
        return "the transformer runs on several devices, and memory is kept on one: roll with lag=0"
    return None


def _share_of_steps(said: Mapping[str, Any]) -> str | None:
    """Arguments that count a pipeline's steps, of which blocks take theirs at different times."""
    starts = {"control_guidance_start": 0.0, "control_guidance_end": 1.0}
    for name, full in starts.items():
        value = said.get(name, full)
        if any(v != full for v in (value if isinstance(value, (list, tuple)) else [value])):
            return f"{name} is {value}, and must be {full}: blocks take their steps at different times (lag=0 does not)"
    if said.get("skip_guidance_layers") is not None:
        return "skip_guidance_layers acts on some steps only, and blocks take theirs at different times: leave it out"
    return None


def _distilled(model: Any) -> bool:
    return bool(model.config.get("guidance_embeds", False))


def check_levels(text_level: str, context_noise: float) -> None:
    """ValueError, of one sentence, for what they may not be."""
    check_text_level(text_level)
    if not 0 <= context_noise < 1:
        raise ValueError(f"context_noise is {context_noise}, and must be at least 0 (clean) and below 1")


def _stand_in(pipe: Any, run: Run) -> Any:
    """A shallow copy of the pipeline whose scheduler and transformer ask the run. The pipeline never knows."""
    kind = type(pipe)
    frozen = {
        name: property(lambda self, name=name: getattr(pipe, name))
        for name in ("_execution_device", "device", "dtype", "components")
        if hasattr(kind, name)
    }

    def live(name: str) -> property:
        return property(lambda self: vars(pipe).get(name), lambda self, value: vars(pipe).update({name: value}))

    def prepare_latents(self: Any, *args: Any, **options: Any) -> Any:
        latents = kind.prepare_latents(self, *args, **options)
        run.prepared(latents)
        return latents

    def get_timesteps(self: Any, *args: Any, **options: Any) -> Any:
        timesteps, *rest = kind.get_timesteps(self, *args, **options)
        return (run.take(timesteps), *rest)

    def progress_bar(self: Any, iterable: Any = None, total: int | None = None) -> Any:
        if iterable is not None or run.plan.alone:
            return kind.progress_bar(self, iterable, total)
        bar = run.bar = kind.progress_bar(self, total=run.plan.ticks)
        bar.update = lambda n=1: None  # the run's ticks move it: the pipeline counts steps
        return bar

    more: dict[str, Any] = {"prepare_latents": prepare_latents, "progress_bar": progress_bar}
    more |= {"maybe_free_model_hooks": lambda self: pipe.maybe_free_model_hooks()} | {n: live(n) for n in LIVE}
    if hasattr(kind, "get_timesteps"):
        more["get_timesteps"] = get_timesteps
    twin = copy.copy(pipe)
    twin.__class__ = type(kind.__name__, (kind,), {**frozen, **more, "__module__": kind.__module__})
    vars(twin)["scheduler"], vars(twin)["transformer"] = run.scheduler, Transformer(run, pipe.transformer)
    if run.control is not None:
        vars(twin)["controlnet"] = run.control
    return twin
