"""Cohorts: a running, suspended call of a sampler function that knows nothing of it.

k-diffusion's and ComfyUI's samplers are loops that call `model(x, sigma)`. A cohort runs one of them, unmodified, in a
greenlet of the caller's thread, and stops it inside that call until somebody has the answer.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextvars import copy_context
from hashlib import blake2b
from typing import Any

import torch
from greenlet import getcurrent, greenlet
from torch import Tensor

from .order import Block

ADAPTIVE = ("dpm_adaptive", "dpm_fast")  # samplers that choose their own noise levels

Sampler = Callable[..., Tensor]


def check_sampler(sampler: Sampler) -> None:
    """ValueError for samplers that choose their own noise levels: no two blocks would agree on theirs."""
    name = getattr(sampler, "__name__", type(sampler).__name__)
    if any(adaptive in name for adaptive in ADAPTIVE) or "sigma_min" in inspect.signature(sampler).parameters:
        raise ValueError(
            f"the sampler {name} chooses its own noise levels, so blocks cannot move together: "
            "take one that follows the sigmas it is given, such as euler or dpmpp_2m"
        )


def block_seed(seed: int, block: Block) -> int:
    """A seed (64 bits) made of a seed and a block's place: the same place draws the same noise in every order."""
    return int.from_bytes(blake2b(f"{seed} {block.top} {block.left}".encode(), digest_size=8).digest(), "little")


class Cohort:
    """One call sampler(model, x, sigmas, **options), from `begin()` on suspended at `request` = (x, sigma) until
    `resume(x0)`.

    When the sampler returns, `request` is None and `result` is what it returned. Grad mode and random state inside are
    the cohort's own, so that interleaved cohorts neither see each other nor leave a trace outside; with seed None the
    sampler draws from the caller's random state, as a plain call does. Attributes that the sampler reads from its model
    are `denoiser`'s.
    """

    def __init__(
        self,
        sampler: Sampler,
        x: Tensor,
        sigmas: Tensor,
        options: Mapping[str, Any],
        denoiser: object = None,
        seed: int | None = None,
    ):
        self.request: tuple[Tensor, Tensor] | None = None
        self.result: Tensor | None = None
        self.answer: Tensor | None = None  # the last x0
        self.grad = torch.is_grad_enabled()  # in which the sampler made its request
        self.calls = 0
        self.marks: list[int] = []  # model calls made before each step that was reported
        self._generators = [] if seed is None else _default_generators(x.device)
        self._states = [torch.Generator(g.device).manual_seed(seed or 0).get_state() for g in self._generators]
        model = _Model(self, denoiser)
        self._greenlet = greenlet(lambda: sampler(model, x, sigmas, callback=self._mark, disable=True, **options))
        self._greenlet.gr_context = copy_context()

    def begin(self) -> None:
        """Runs until the first request.

        Not part of __init__, and called from as deep as `resume`: a torch error takes a native backtrace, which walks
        out of the greenlet into the frames of whoever began it. At another depth these are no longer there, and the
        process would die of what should have been an exception.
        """
        self._enter(self._greenlet.switch)

    def resume(self, x0: Tensor) -> None:
        """Answer the request; runs until the next one, or to the end."""
        self.answer = x0
        self._enter(self._greenlet.switch, x0)

    def close(self) -> None:
        """End the sampler where it stands, its `finally` clauses included."""
        if not self._greenlet.dead:
            self._enter(self._greenlet.throw)

    def _enter(self, switch: Callable[..., Any], *values: Tensor) -> None:
        """Switch into the sampler and back, with its grad mode and random state."""
        grad = torch.is_grad_enabled()
        outside = [g.get_state() for g in self._generators]
        for generator, state in zip(self._generators, self._states):
            generator.set_state(state)
        self._greenlet.parent = getcurrent()
        try:
            returned = switch(*values)
        finally:
            self._states = [g.get_state() for g in self._generators]
            for generator, state in zip(self._generators, outside):
                generator.set_state(state)
            torch.set_grad_enabled(grad)
        if self._greenlet.dead:
            self.request, self.result = None, returned

    def _wait(self, x: Tensor, sigma: Tensor) -> Tensor:
        """Inside the sampler: leave a request, and come back with its answer."""
        self.calls += 1
        self.request, self.grad = (x, torch.as_tensor(sigma).flatten()[0]), torch.is_grad_enabled()
        hub = self._greenlet.parent
        assert hub is not None
        answer = hub.switch()
        torch.set_grad_enabled(self.grad)
        return answer

    def _mark(self, info: dict) -> None:
        """Samplers report a step once, after the step's first model call."""
        self.marks.append(self.calls - 1)


class _Model:
    """What the sampler takes for the model."""

    def __init__(self, cohort: Cohort, denoiser: object):
        self._cohort, self._denoiser = cohort, denoiser

    def __call__(self, x: Tensor, sigma: Tensor, **extra_args: Any) -> Tensor:
        return self._cohort._wait(x, sigma)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._denoiser, name)


def _default_generators(device: torch.device) -> list[torch.Generator]:
    """Those that samplers draw from when they name none."""
    generators = [torch.default_generator]
    if device.type in ("cuda", "xpu"):
        generators.append(getattr(torch, device.type).default_generators[device.index])
    elif device.type == "mps":
        generators.append(torch.mps._get_default_mps_generator())
    return generators


def rehearse(sampler: Sampler, x: Tensor, sigmas: Tensor, options: Mapping[str, Any], denoiser: object) -> list[int]:
    """Model calls that a sampler makes before each of its S steps, and in all: S + 1 numbers.

    Found by running it on a model that answers zero, so that no step is ever recovered by comparing noise levels:
    heun asks for the level of the next step before that step begins.
    """
    if "noise_sampler" in options:  # its draws belong to the real run
        options = {**options, "noise_sampler": lambda sigma, sigma_next: torch.zeros_like(x)}
    cohort = Cohort(sampler, x, sigmas, options, denoiser, seed=0)
    try:
        cohort.begin()
        while cohort.request is not None:
            cohort.resume(torch.zeros_like(x))
    finally:
        cohort.close()
    if len(cohort.marks) != len(sigmas) - 1 or cohort.marks[0] != 0:
        raise ValueError(
            f"the sampler reports {len(cohort.marks)} steps for {len(sigmas) - 1}, so blocks cannot be told when to "
            "wait: take one that calls its callback once a step, such as euler or dpmpp_2m"
        )
    return [*cohort.marks, cohort.calls]
