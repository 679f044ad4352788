"""However a rollout ends, it leaves no cohort, no other grad mode and no other random numbers behind."""

import gc
import math

import torch
from greenlet import getcurrent, greenlet
from pytest import fixture, mark, raises
from tiny_denoiser import SIGMAS, Log, euler, noise, plan_of, run

from rolling_diffusion.core.order import Block
from rolling_diffusion.core.rollout import rollout


def alive():
    """Suspended greenlets, besides those that run."""
    return [g for g in gc.get_objects() if type(g) is greenlet and g and g is not getcurrent()]


@fixture
def clean():
    """Fails the test that leaves a cohort, another grad mode, or other random numbers behind."""
    before, grad, state = alive(), torch.is_grad_enabled(), torch.get_rng_state()
    yield
    assert len(alive()) == len(before)
    assert torch.is_grad_enabled() == grad
    assert torch.equal(torch.get_rng_state(), state)


class Failing(Log):
    def __init__(self, tick, error=None, value=math.nan):
        super().__init__()
        self.tick, self.error, self.value, self.cohorts = tick, error, value, 0

    def denoise(self, moving, keep=False):
        answers = super().denoise(moving, keep)
        if sum(event == "denoise" for event, _ in self.events) == self.tick + 1 and not keep:
            self.cohorts = len(alive())
            if self.error:
                raise self.error
            answers[-1][..., 0, 0] = self.value
        return answers


@mark.parametrize("name", ["euler_ancestral", "dpmpp_sde", "heun"])
@mark.parametrize("plan", [plan_of(4, lag=1), plan_of(4, lag=1, draft=2), plan_of(4, lag=0), plan_of(1)])
@mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("out of memory")])
def test_an_interrupt_leaves_nothing_behind(k_sampling, clean, name, plan, error):
    model = Failing(3, error)
    with raises(type(error)):
        run(plan, model, getattr(k_sampling, f"sample_{name}"))
    assert model.cohorts >= (1 if plan.alone else 4)


@mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_named(k_sampling, clean, value):
    with raises(FloatingPointError, match=r"NaN or infinity for block 2 in tick 3 at noise level 0\.75"):
        run(plan_of(4, lag=1, lookahead=0, draft=1), Failing(3, value=value), k_sampling.sample_euler)


def test_closing_or_dropping_the_generator_leaves_nothing_behind(k_sampling, clean):
    for end in (lambda stream: stream.close(), lambda stream: None):
        stream = rollout(plan_of(4, lag=1), Log(), k_sampling.sample_euler_ancestral, SIGMAS, noise)
        next(stream)
        assert len(alive()) >= 3
        end(stream)
        del stream
        gc.collect()
        assert not alive()


def test_errors_of_the_callback_the_sampler_and_the_noise_leave_nothing_behind(clean):
    def bad(frame):
        if frame.tick == 3:
            raise KeyError("callback")

    with raises(KeyError, match="callback"):
        run(plan_of(4, lag=1), callback=bad)
    with raises(TypeError, match="eta"):
        run(plan_of(4, lag=1), options={"eta": 1})

    def late(block: Block):
        return noise(block) if block.index < 2 else torch.ones(1)[3]

    with raises(IndexError):
        list(rollout(plan_of(4, lag=1, lookahead=0), Log(), euler, SIGMAS, late))


def test_cohorts_end_newest_first_and_all_of_them(clean):
    ended = []

    def untidy(model, x, sigmas, **options):
        try:
            return euler(model, x, sigmas, **options)
        finally:
            ended.append(int(x.mean()) - 1)
            if len(ended) == 2:
                raise OSError("in finally")

    with raises(OSError, match="in finally"):
        run(plan_of(4, lag=1), Failing(1, KeyboardInterrupt()), untidy)
    assert ended == [3, 2, 1, 0]


def test_grad_mode_is_the_samplers_inside_and_the_callers_outside(k_sampling, clean):
    modes = []

    class Modes(Log):
        def denoise(self, moving, keep=False):
            modes.append(torch.is_grad_enabled())
            return super().denoise(moving, keep)

        def commit(self, block, x0):
            modes.append(torch.is_grad_enabled())

    for _ in rollout(plan_of(4, lag=1), Modes(), k_sampling.sample_euler, SIGMAS, noise):
        assert torch.is_grad_enabled()
    assert not any(modes)
    weight = torch.tensor(1.0, requires_grad=True)
    blocks = [x for _, x in rollout(plan_of(4, lag=1), Modes(), euler, SIGMAS, lambda block: noise(block) * weight)]
    sum(x.sum() for x in blocks).backward()
    assert weight.grad is not None and weight.grad > 0


def test_answers_that_do_not_fit_are_refused(clean):
    class Short(Log):
        def denoise(self, moving, keep=False):
            return super().denoise(moving, keep)[1:]

    with raises(ValueError, match="in tick 0 the denoiser answered"):
        run(plan_of(), Short())
