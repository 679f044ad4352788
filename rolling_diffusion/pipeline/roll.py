"""roll(pipe): a pipeline of diffusers, drawing in an order. The pipeline stays what it was."""

from __future__ import annotations

import copy
import difflib
import inspect
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from torch import Tensor

from ..core.order import STRAIGHT, route_of, whole
from ..core.plan import Plan
from ..defaults import Card, check_text_level, context_of, plan_for
from ..models.call import swapped, unwrapped
from ..models.registry import family_of
from ..models.shares import degree
from ..models.shares import refusal as refused_shares
from .decoding import CircleDecoder
from .given import Source
from .guidance import decide
from .places import SOFT, Places, is_placed
from .run import Run, Scheduler, Tick, Transformer
from .schedulers import choose, take_levels
from .space import NONE_LEFT, OutOfMemory, out_of_memory, place_memory, ran_out
from .stream import Strip, stream

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
        self.latents: Any = None  # of the last call, finished, in the form in which the pipeline steps them
        self.guiding = False  # whether a small picture is drawn that guides another call
        self.memory_bytes = 0  # of keys and values, that the last call held at most, in this process

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
        given: Any = None,
        given_mask: Any = None,
        guide: Any = None,
        prompt_blend: int = SOFT,
        wrap: str | None = None,
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
        given: what of the canvas is finished from the start: a picture as large as the canvas, or latents, as cells
            (pictures, channels, height, width) or in the pipeline's own form. It comes out as it is, is seen as
            finished blocks are, and costs one call.
        given_mask: where: a picture or array of as many pixels, or cells, white or true where it is given; None for
            where a picture is opaque. What is given of a token is given if all of it is.
        prompt: also [(place, prompt), …], each for its part of the canvas: a place is a share (a float below 1) or
            pixels (an int) along the order, from which on it holds, or a rectangle (left, top, right, bottom) of
            pixels, over what was said before. prompt_blend: pixels over which one gives way to the next.
        wrap: "x", "y" or "xy": along these axes the canvas is a circle, without a seam where its edges meet.
        guide: whether the whole picture is drawn small first, at the model's own size, and enlarged in place of the
            draft; or a picture that takes its place. None: on a canvas larger than the model's own, where neither draft
            nor lag are said.

        What is None comes from the model's card. callback_on_step_end is called once a tick, with the whole canvas;
        what it changes acts. The pipeline itself, its scheduler, hooks and, with a generator, the default random state
        are as they were, however the call ends. ValueError, of one sentence, for what does not fit together.
        """
        said = self._bound(args, options)
        source = given if isinstance(given, Source) else self._given(given, given_mask)
        places = self._places(said, order, prompt_blend)
        if wrap is not None and (wrap not in ("x", "y", "xy", "yx") or not self.family.turns):
            if self.family.turns:
                raise ValueError(f"wrap is {wrap!r}, and must be 'x', 'y', 'xy' or None")
            raise ValueError(
                f"{type(self.pipe).__name__} has learned its places one by one, so a canvas cannot be a circle: leave "
                "wrap out"
            )
        own = "strength" in self.parameters or said.get("timesteps") is not None  # begins elsewhere itself
        if guide and (own or source is not None):
            why = "what is given needs none" if source is not None else "it begins with a picture, or steps, of its own"
            raise ValueError(f"{type(self.pipe).__name__} cannot be guided, as {why}: leave guide out")
        picture = None if guide is None or isinstance(guide, bool) else guide
        small = ("auto" if guide is None else bool(guide)) if not own and source is None else False
        spoken = dict(said)
        pipe, card, family = self.pipe, self.card, self.family
        model = unwrapped(pipe.transformer)
        refused = family.refusal(model) or _refusal(model) or refused_shares(model)
        text_level = card.text_level if text_level is None else text_level
        noise = card.context_noise if context_noise is None else context_noise
        check_levels(text_level, noise)
        projected, words = decide(self.card, self.parameters, said, cfg, _distilled(model))
        said |= words
        self._complete(said)
        generator = said.get("generator")
        draws = generator if isinstance(generator, (list, tuple)) else [] if generator is None else [generator]
        seeds = [g.initial_seed() for g in draws] or None
        if degree(model) > 1:
            refused = refused or _refused_together(pipe, seeds)

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
                given=() if source is None else source.blocks(height, width),
                guide=small,
            )
            if guide and not plan.first:
                raise ValueError(
                    f"guide needs a canvas larger than the model's own {card.native_tokens} tokens that rolls after a "
                    "draft: leave it out"
                )
            if not plan.alone or plan.given:
                for sentence in (refused, _share_of_steps(said)):
                    if sentence:
                        raise ValueError(sentence)
            return plan

        def start(plan: Plan) -> Tensor:
            """The guide, as clean latents of the whole canvas."""
            canvas = plan.height, plan.width
            if picture is not None:
                return family.encode(pipe, pipe.image_processor.preprocess(picture, *(unit * side for side in canvas)))
            down, across = plan.guide or canvas
            call = {"height": down * unit, "width": across * unit, "output_type": "latent"}
            call |= {name: None for name in ("callback_on_step_end", "latents") if name in self.parameters}
            if "max_area" in self.parameters:  # to which Kontext enlarges whatever size it is told
                call["max_area"] = call["height"] * call["width"]
            if draws:
                again = [torch.Generator(g.device).manual_seed(g.initial_seed()) for g in draws]
                call["generator"] = again if isinstance(generator, (list, tuple)) else again[0]
            if places is not None:
                call["prompt"] = places.on((down, across), canvas)
            words = {"cfg": cfg, "sampler": sampler, "scheduler_sigmas": scheduler_sigmas, "prompt_blend": prompt_blend}
            # At lag 0 the order says where places lie, and no more: blocks of an own one are of the large canvas.
            way = order if isinstance(order, str) else "raster"
            self.guiding = True
            try:
                self(**{**spoken, **call}, **words, lag=0, guide=False, order=way, wrap=wrap)
            finally:
                self.guiding = False
            return family.enlarged(self.latents, (down, across), canvas, wrap or "")

        unit = pipe.vae_scale_factor
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
            projected,
            seeds=seeds,
            named=sampler is not None or scheduler_sigmas is not None,
            text_level=text_level,
            context_noise=noise,
            cap=cap,
            place_memory=place,
            on_tick=on_tick,
            given=source,
            start=start,
            places=places,
            wrap=wrap or "",
        )
        stepper, levels = choose(copy.deepcopy(pipe.scheduler), sampler, scheduler_sigmas)
        adopt = None if stepper is levels else lambda source: take_levels(stepper, source, pipe._execution_device)
        limit = self._limit(said, run, lag)
        run.scheduler = Scheduler(run, stepper, levels, adopt, limit)
        stand_in, hooked = _stand_in(pipe, run), hasattr(model, "_diffusers_hook")
        try:
            with swapped([] if self.guiding else [(vars(pipe), name, None) for name in LIVE]):  # a stop stays one
                return type(pipe).__call__(stand_in, **said)
        except (MemoryError, RuntimeError) as error:
            if not ran_out(error):
                raise
            plan = None if run._plan is None or run._plan.alone else run._plan
            if plan is None and isinstance(error, OutOfMemory):
                raise
        finally:
            self.memory_bytes, self.latents = run.most_bytes, run.latents
            run.clear()
            if not hooked:  # the pipeline leaves one, empty, for step caches
                vars(model).pop("_diffusers_hook", None)
        del run, stand_in  # no frame of the run is alive and holds what it held
        raise OutOfMemory(NONE_LEFT) if plan is None else out_of_memory(plan, kept[0] or model.device)

    @property
    def tokenizer(self) -> Any:
        """That of the text that is attended to, by Flux's, SD 3's, and others' names; None without one."""
        names = ("tokenizer_2", "tokenizer_3", "tokenizer")
        return next((found for name in names if (found := getattr(self.pipe, name, None)) is not None), None)

    def stream(
        self,
        prompts: Any,
        *,
        width: int | None = None,
        height: int | None = None,
        order: str = "left-to-right",
        length: int | None = None,
        stretch: int | None = None,
        context: int | None = None,
        seed: int = 0,
        state: Mapping[str, Tensor] | None = None,
        **options: Any,
    ) -> Iterator[Strip]:
        """Strips of a canvas of any length, as they are finished: for strip in roll(pipe).stream(prompts, height=256)

        prompts: one for all; one for each stretch, without end if they never end; or (place, prompt), a place being a
            share of the length (a float below 1) or pixels (an int), from which on it holds.
        width, height: pixels across the order, the one that the order does not go along; None for the model's own.
        order: left-to-right, right-to-left, top-to-bottom or bottom-to-top.
        length: pixels along the order; None to go on until the prompts end.
        stretch: pixels along the order that are drawn by one call; None for the model's own size.
        context: pixels of the end of the stretch before that a call sees; None for half of a stretch.
        seed: of all noise. state: that of a `Strip`, to go on after it: what follows is what would have followed.

        Other arguments are those of a call, the same for every stretch. Memory does not grow with the length. Strips of
        a decoder of convolutions are pixel by pixel those of the whole canvas; other decoders' are blended.
        ValueError, of one sentence, for what does not fit together.
        """
        if order not in STRAIGHT:
            raise ValueError(f"order is {order!r}, and a stream goes {', '.join(STRAIGHT)}")
        for name in ("wrap", "given", "given_mask", "guide", "prompt", "generator", "output_type"):
            if options.get(name) is not None:
                raise ValueError(f"{name} is of a single canvas, and a stream has none: leave it out")
        along = "height" if route_of(order).axis == "rows" else "width"
        sides = {"height": height, "width": width}
        across = "width" if along == "height" else "height"
        if sides[along] is not None:
            raise ValueError(f"{along} is {sides[along]}, and a stream {order} has a length instead: say length")
        cell = self.pipe.vae_scale_factor
        unit = cell * self.family.patch

        def cells(name: str, pixels: int | None, default: int, least: int = unit) -> int:
            pixels = whole(name, default if pixels is None else pixels, least, "pixels")
            if pixels % unit:
                low = max(unit, pixels // unit * unit)
                raise ValueError(f"{name} is {pixels} pixels, and must be a multiple of {unit}: take {low}")
            return pixels // cell

        own = cells("stretch", stretch, self.card.size)
        if not isinstance(prompts, (str, Iterator)) and isinstance(prompts, Sequence):
            prompts = [(cells("a prompt's place", p[0], 0, 0), p[1]) if _is_place(p) else p for p in prompts]
        return stream(
            self,
            prompts,
            order=order,
            across=cells(across, sides[across], self.card.size),
            length=None if length is None else cells("length", length, 0),
            stretch=own,
            context=cells("context", context, context_of(own * cell, unit), 0),
            seed=whole("seed", seed, 0),
            state=state,
            options=options,
        )

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

    def _places(self, said: dict[str, Any], order: Any, soft: int) -> Places | None:
        """Prompts with places; of those the first is what the pipeline is told."""
        if not is_placed(said.get("prompt")):
            return None
        places = Places(said["prompt"], order, soft, self.pipe.vae_scale_factor, self.family.patch)
        said["prompt"] = places.texts[0]
        if len(places.texts) == 1:
            return None
        if getattr(self.pipe, "controlnet", None) is not None:
            raise ValueError("prompts with places do not go with a ControlNet: say one prompt")
        if degree(unwrapped(self.pipe.transformer)) > 1:
            raise ValueError("prompts with places are not shared out over several devices: say one prompt, or take one")
        others = [name for name in ("prompt_2", "prompt_3", "prompt_embeds") if said.get(name) is not None]
        if others:
            raise ValueError(f"{others[0]} is of one prompt, and the prompt has places: leave it out")
        return places

    def _given(self, given: Any, mask: Any) -> Source | None:
        """What is given, checked as far as it can be before the size of the canvas is known."""
        if given is None:
            if mask is not None:
                raise ValueError("given_mask says where something is given, and nothing is: say what with given")
            return None
        own = next((name for name in ("mask_image", "strength") if name in self.parameters), None)
        if own is not None:
            raise ValueError(
                f"{type(self.pipe).__name__} takes {own}, and begins with a picture itself: use given with a pipeline "
                "that begins with noise"
            )
        if type(self.pipe).__name__ == "Flux2KleinPipeline" and isinstance(given, torch.Tensor) and given.ndim == 4:
            raise ValueError(
                "given has the latents that Flux2KleinPipeline gives, which are of its VAE and not of its transformer: "
                "take those of roll(pipe).latents, or a picture"
            )
        return Source(self.pipe, self.family, given, mask)

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
            "guidance_scale": card.guidance if _distilled(unwrapped(self.pipe.transformer)) else None,
        }.items():
            if name in self.parameters and said.get(name) is None and value is not None:
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
            sigmas = said.get("sigmas")
            steps = said.get("num_inference_steps") or self.parameters["num_inference_steps"].default
            steps = steps if sigmas is None else len(sigmas)
            return mu if run.make_plan(run.height, run.width, steps, 1).alone else most

        return limit

    def _size(self, said: Mapping[str, Any]) -> tuple[int, int]:
        """Cells of the canvas, where a pipeline asks for its noise levels before it makes its latents."""
        pixels = self.pipe.vae_scale_factor * self.family.patch
        default = self.pipe.default_sample_size * self.pipe.vae_scale_factor
        sides = (int(said.get(name) or default) for name in ("height", "width"))
        height, width = (self.family.patch * (side // pixels) for side in sides)
        return height, width


def _is_place(prompt: Any) -> bool:
    """Is it (pixels, prompt)?"""
    pair = isinstance(prompt, Sequence) and not isinstance(prompt, str) and len(prompt) == 2
    return pair and not isinstance(prompt[0], float)


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
    return None


def _refused_together(pipe: Any, seeds: Any) -> str | None:
    """What several processes with one call between them cannot do."""
    if seeds is None:
        return "each process would draw noise of its own: give a generator, with the same seed in each"
    if getattr(pipe, "controlnet", None) is not None:
        return "what a ControlNet adds is not shared out over several devices: run it on one"
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
        bar = run.bar = kind.progress_bar(self, total=run.plan.ticks - run.plan.first)
        bar.update = lambda n=1: None  # the run's ticks move it: the pipeline counts steps
        return bar

    def encode_prompt(self: Any, *args: Any, **options: Any) -> Any:
        bound = signature.bind(self, *args, **options)
        if run.places is None or bound.arguments["prompt"] is not run.places.texts[0]:
            return kind.encode_prompt(self, *args, **options)
        others = {name: None for name in ("prompt_2", "prompt_3") if name in signature.parameters}
        encoded = [kind.encode_prompt(**bound.arguments | {"prompt": text} | others) for text in run.places.texts]
        return run.places.join(encoded)

    more: dict[str, Any] = {"prepare_latents": prepare_latents, "progress_bar": progress_bar}
    if run.places is not None:
        signature = inspect.signature(kind.encode_prompt)
        more["encode_prompt"] = encode_prompt
    more |= {"maybe_free_model_hooks": lambda self: pipe.maybe_free_model_hooks()} | {n: live(n) for n in LIVE}
    if hasattr(kind, "get_timesteps"):
        more["get_timesteps"] = get_timesteps
    twin = copy.copy(pipe)
    twin.__class__ = type(kind.__name__, (kind,), {**frozen, **more, "__module__": kind.__module__})
    vars(twin)["scheduler"], vars(twin)["transformer"] = run.scheduler, Transformer(run, pipe.transformer)
    if run.control is not None:
        vars(twin)["controlnet"] = run.control
    if run.wrap:
        vars(twin)["vae"] = CircleDecoder(pipe.vae, run.wrap)
    return twin
