"""The sampler object: ComfyUI's own samplers, one suspended call per block, behind ComfyUI's SAMPLER interface."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import comfy.samplers
import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..core.cohort import ADAPTIVE
from ..core.order import rectangles, span
from ..core.rollout import rollout
from .canvas import BlockModel, is_compiled, log, uncompiled
from .flux import FluxDenoiser, per_block_noise
from .notes import Notes, doubts
from .settings import Settings, cell_pixels
from .windows import WindowDenoiser

if TYPE_CHECKING:
    from ..core.order import Block


def check_suspendable(name: str) -> None:
    """ValueError for a sampler that cannot run once per block."""
    if name in ADAPTIVE:
        raise ValueError(
            f"{name} chooses its own noise levels, so blocks cannot move together: take another sampler, such as euler."
        )


class Rolling(comfy.samplers.Sampler):
    """A SAMPLER that runs another SAMPLER once per block, with autoregressive rolling diffusion.

    With one block it gives what the other gives, bit for bit.

    origin: cells (down, across) at which the prompt's picture begins, on a canvas that continues another one: what the
    mask keeps of it is then given in any case.
    """

    def __init__(
        self, sampler: Any, settings: Settings, notes: Notes | None = None, origin: tuple[int, int] | None = None
    ):
        self.sampler, self.settings, self.notes, self.origin = sampler, settings, notes, origin
        self.kept: Tensor | None = None  # (height, width) of the last run: cells that were given, not computed

    def __getattr__(self, name: str) -> Any:
        if name in ("sampler", "settings", "notes", "origin", "kept"):
            raise AttributeError(name)
        return getattr(self.sampler, name)

    def sample(self, model_wrap, sigmas, extra_args, callback, noise, latent_image=None, denoise_mask=None,
               disable_pbar=False):  # fmt: skip
        function = getattr(self.sampler, "sampler_function", None)
        name = getattr(function, "__name__", "").removeprefix("sample_").removesuffix("_function")
        check_suspendable(name)
        stock = (model_wrap, sigmas, extra_args, callback, noise, latent_image, denoise_mask, disable_pbar)
        notes = self.notes or Notes()
        if noise.ndim not in (4, 5) or noise.shape[-2] < 2 or len(sigmas) < 2:
            notes.tell(f"A latent {tuple(noise.shape)} has no rows and columns to order: sampled as one.")
            return self.sampler.sample(*stock)
        run = _Run(self.sampler, self.settings, notes, self.origin, *stock)
        result = run.sample()
        self.kept = None if run.leftover else run.kept
        return result


def given_by(mask: Tensor, multiple: int) -> tuple[Block, ...]:
    """What an inpainting mask (…, height, width) keeps, in whole tokens: blocks to be given. Beyond the canvas's far
    edges, which tokens may cross, all is kept."""
    kept = (mask == 0).flatten(0, -3).all(0)
    down, across = (-side % multiple for side in kept.shape)
    kept = torch.nn.functional.pad(kept, (0, across, 0, down), value=True)
    tokens = kept.unflatten(0, (-1, multiple)).unflatten(2, (-1, multiple)).all(3).all(1)
    return rectangles(tokens.tolist(), multiple)


class _Run:
    """One sampling run: the plan, the denoiser, and the canvas that the blocks are put together on."""

    def __init__(
        self, sampler, settings, notes, origin, guider, sigmas, extra_args, callback, noise, latent, mask, quiet
    ):
        self.sampler, self.settings, self.guider, self.sigmas, self.quiet = sampler, settings, guider, sigmas, quiet
        self.extra_args, self.callback, self.noise, self.mask = extra_args, callback, noise, mask
        self.latent = torch.zeros_like(noise) if latent is None else latent
        self.seed = extra_args.get("seed")
        options = extra_args.get("model_options", {})
        flux, why_not = per_block_noise(guider.inner_model, options, noise.ndim)
        multiple = guider.inner_model.diffusion_model.patch_size if flux else 1
        pixels = cell_pixels(guider.inner_model)
        self.leftover = bool(sigmas[-1] > 0)
        self.kept: Tensor | None = None
        self.plan = settings.plan(*noise.shape[-2:], len(sigmas) - 1, multiple, pixels)
        rolls = origin is not None or not self.plan.alone
        if mask is not None and rolls and "denoise_mask_function" not in options:
            self._give(given_by(mask, multiple), multiple, pixels)
        self.stock = self.plan.alone and not self.plan.pieces  # ordinary sampling
        self._tell(notes, why_not, pixels, origin is not None)
        if not self.stock:
            options = uncompiled(options)
        arguments = guider, options, self.seed, noise, self.latent, sigmas, mask
        if flux:
            self.canvas: FluxDenoiser | WindowDenoiser = FluxDenoiser(
                *arguments,
                plan=self.plan,
                cap=settings.memory_cap or None,
                context_noise=settings.context_noise,
            )
        else:
            self.canvas = WindowDenoiser(*arguments, plan=self.plan, persistence=settings.persistence)
        self.canvas.origin = origin or (0, 0)

    def _give(self, given: tuple[Block, ...], multiple: int, pixels: int) -> None:
        """What the mask keeps is finished from the start: blocks wholly outside it are not computed."""
        height, width = self.noise.shape[-2:]
        kept = torch.zeros(height, width, dtype=torch.bool)
        if all_of_it := sum(part.cells for part in given) == self.plan.height * self.plan.width:
            kept.fill_(True)
        elif given:
            self.plan = self.settings.plan(height, width, len(self.sigmas) - 1, multiple, pixels, given)
            for piece in self.plan.pieces:
                kept[piece.rows, piece.columns] = True
        if all_of_it or self.plan.pieces:
            self.kept = kept

    def _tell(self, notes: Notes, why_not: str, pixels: int, continues: bool) -> None:
        """What is not as the user would expect it."""
        plan, settings = self.plan, self.settings
        if self.kept is not None and not continues:
            notes.tell(f"The mask keeps {self.kept.float().mean():.0%} of the picture: it is seen, and not computed.")
        if self.stock:
            extent = span(plan.order, *self.noise.shape[-2:]) * pixels // 8
            notes.tell(
                f"One block, as without rolling: the window of {settings.window} cells covers the picture. "
                f"It rolls with a rolling_window_size below {extent}."
            )
            return
        if why_not:
            notes.tell(f"{why_not}, so blocks are denoised in windows.")
        if pixels != 8:
            notes.tell(
                f"A cell of this model is {pixels}×{pixels} pixels: the window of {settings.window} cells of 8×8 is "
                f"{plan.window} of them, the overlap {plan.overlap}."
            )
        if is_compiled(self.extra_args.get("model_options", {})):
            notes.tell("The model runs uncompiled while blocks roll: compiled graphs are made for one kind of call.")
        for sentence in doubts(self.extra_args.get("model_options", {}), self.guider, windows=bool(why_not)):
            notes.warn(sentence)

    def sample(self) -> Tensor:
        first, last = self.sigmas[:1], self.sigmas[-1]
        scale = self.canvas.sampling.noise_scaling
        result = self.latent.clone()
        if self.leftover:
            result = self.canvas.sampling.inverse_noise_scaling(last, scale(last, self.noise.clone(), result))
        if self.kept is not None and self.kept.all():
            return result
        most = self.sampler.max_denoise(self.guider, self.sigmas)
        self.canvas.begin(scale(first[0], self.noise.clone(), self.latent, most))
        self.total = self._total()
        bar = tqdm(total=self.total, disable=self.quiet or self.stock)
        self.canvas.shown = lambda: self._shown(bar)
        try:
            seed = None if self.stock else self.seed or 0  # stock, draw from ComfyUI's own random state
            finished = rollout(
                self.plan, self.canvas, self._one_block, self.sigmas, self._start, seed=seed, options=self._options,
                given=lambda piece: self.canvas.cut(self.latent, piece).clone(),
            )  # fmt: skip
            for block, x0 in finished:
                self.canvas.paste(result, block, x0)
        finally:
            bar.close()
            self.canvas.clear()
        return result

    def _shown(self, bar: tqdm) -> None:
        """Progress and preview after each model call."""
        calls = self.canvas.calls
        bar.update(calls - bar.n)
        if self.callback is not None:
            self.callback(calls - 1, self.canvas.x0, self.canvas.x, max(self.total, calls))

    def _start(self, block: Block) -> Tensor:
        return self.canvas.cut(self.canvas.x, block).clone()

    def _options(self, block: Block) -> dict[str, Any]:
        return {"extra_args": {**self.extra_args, "model_options": self.canvas.options}, "block": block}

    def _one_block(self, model, x, sigmas, extra_args, callback, disable, block) -> Tensor:
        """The k-diffusion-shaped function that the rollout runs per block: the sampler, on the block's part of all."""
        cut = self.canvas.cut

        def call(x: Tensor, sigma: Tensor, own: dict | None) -> Tensor:
            own = self.canvas.options if own is None else own
            self.canvas.asked[block] = sigma, own
            x0 = model(x, sigma)
            return x0 if self.stock else self.canvas.finish(block, x0, x, sigma, own)

        def mark(step: int, x0: Tensor, x: Tensor, total: int) -> None:
            callback({"i": step, "denoised": x0, "x": x})

        mask = None if self.mask is None else cut(self.mask, block)
        noise, latent = cut(self.noise, block), cut(self.latent, block)
        quiet = disable and self.quiet if self.stock else True
        return self.sampler.sample(
            BlockModel(self.guider, call), sigmas, dict(extra_args), mark, noise, latent, mask, quiet
        )

    def _total(self) -> int:
        """Calls of the model: a sampler's own are counted by running it on a model that answers nothing."""
        plan, steps = self.plan, len(self.sigmas) - 1
        per_step = self._count(steps) / steps
        run = round((steps - plan.draft) * per_step)
        draft = round(plan.draft * per_step)
        last = plan.start(len(plan.blocks) - 1, draft, run) + (run if not plan.alone else run + draft)
        cost = plan.cost()
        if isinstance(self.canvas, FluxDenoiser):
            rule = self.canvas.rule
            return last + cost.waiting_calls * rule.stores("waiting") + cost.commits * rule.stores("finished")
        return last if plan.alone else draft + run * len(plan.blocks)

    def _count(self, steps: int) -> int:
        calls = 0

        def nothing(x: Tensor, sigma: Tensor, own: dict | None) -> Tensor:
            nonlocal calls
            calls += 1
            return torch.zeros_like(x)

        tiny = torch.ones_like(self.noise[:1, :, ..., :1, :1])
        extra = {**self.extra_args, "seed": 0}
        with torch.random.fork_rng(devices=[]):
            try:
                self.sampler.sample(
                    BlockModel(self.guider, nothing), self.sigmas, extra, None, tiny, tiny * 0, None, True
                )
            except Exception as error:  # a foreign sampler that wants a real model: the bar is then a guess
                log.debug("Rolling: could not count the calls of %s: %s", type(self.sampler).__name__, error)
                return steps
        return max(calls, 1)
