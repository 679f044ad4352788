"""The real k-diffusion samplers, unmodified: bit for bit the plain call wherever theory says so."""

from contextlib import nullcontext
from itertools import combinations

import torch
from pytest import fixture, mark, raises

from rolling_diffusion.core.cohort import block_seed
from rolling_diffusion.core.plan import make_plan
from rolling_diffusion.core.rollout import rollout

pytestmark = mark.filterwarnings("ignore:Should have tb<=t1")  # torchsde's rounding, in the plain call too

ORDINARY = ("euler", "heun", "dpm_2", "lms", "dpmpp_2m")
STOCHASTIC = ("euler_ancestral", "dpmpp_2s_ancestral", "dpmpp_sde", "dpmpp_2m_sde")
SAMPLERS = ORDINARY + STOCHASTIC
SIGMAS = torch.tensor([14.6, 7.1, 3.0, 1.3, 0.5, 0.1, 0.0], dtype=torch.float64)
STEPS = len(SIGMAS) - 1
NOISE = 14.6 * torch.randn(2, 3, 12, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@fixture(params=SAMPLERS)
def sampler(request, k_sampling):
    return getattr(k_sampling, f"sample_{request.param}")


def separable(x, sigma):
    """An x0 in which each cell depends on itself alone."""
    return torch.tanh(x / (1 + sigma**2).sqrt()) * 0.7


def coupled(x, sigma):
    """An x0 in which each cell depends on the whole canvas."""
    return separable(x + x.mean((2, 3), keepdim=True) + x.roll((1, 2), (2, 3)), sigma)


def plain(sampler, model, x, seed=None, sigmas=SIGMAS):
    with torch.random.fork_rng(devices=[]):
        if seed is not None:
            torch.manual_seed(seed)
        return sampler(lambda x, sigma: model(x, sigma.view(-1, 1, 1, 1)), x, sigmas, disable=True)


class Canvas:
    """Puts the blocks that it is asked for together, and answers with the model of the whole."""

    def __init__(self, model):
        self.model, self.waited = model, []

    def denoise(self, moving, keep=False):
        if keep:
            self.waited = [m.sigma for m in moving]
        canvas, sigma = torch.zeros_like(NOISE), torch.zeros_like(NOISE[:1, :1])
        for block, x, level in moving:
            canvas[..., block.rows, block.columns] = x
            sigma[..., block.rows, block.columns] = level
        x0 = self.model(canvas, sigma)
        return [x0[..., b.rows, b.columns] for b, _, _ in moving]

    def commit(self, block, x0):
        pass

    def start(self, block):
        pass


def cut(block):
    return NOISE[..., block.rows, block.columns]


def rolled(plan, model, sampler, **given):
    out = torch.full_like(NOISE, torch.nan)
    for block, x in rollout(plan, Canvas(model), sampler, SIGMAS, cut, **given):
        out[..., block.rows, block.columns] = x
    return out


ONE = make_plan(12, 8, STEPS)
BLOCKS = make_plan(12, 8, STEPS, "spiral-out", window=8, overlap=4, lag=0)


@mark.parametrize("plan", [ONE, BLOCKS], ids=["one block", "lag 0"])
@mark.parametrize("mode", [nullcontext, torch.no_grad, torch.inference_mode])
def test_one_block_or_no_lag_is_the_plain_sampler(sampler, plan, mode):
    with mode():
        assert torch.equal(rolled(plan, coupled, sampler, seed=7), plain(sampler, coupled, NOISE, 7))


@mark.parametrize("plan", [ONE, BLOCKS], ids=["one block", "lag 0"])
def test_without_a_seed_they_draw_from_the_callers_random_state(sampler, plan):
    torch.manual_seed(3)
    expected = plain(sampler, coupled, NOISE)
    assert torch.equal(rolled(plan, coupled, sampler, seed=None), expected)
    assert torch.equal(rolled(plan, coupled, sampler, seed=3), expected)


@mark.parametrize("order", ["top-to-bottom", "spiral-out"])
@mark.parametrize(("lag", "draft"), [(1, 0), (2, 0), (3, 2), ("autoregressive", 0), ("autoregressive", 3)])
def test_on_a_separable_model_every_lag_and_draft_is_the_plain_sampler(sampler, order, lag, draft):
    plan = make_plan(12, 8, STEPS, order, window=8, overlap=4, lag=lag, draft=draft)
    out = rolled(plan, separable, sampler, seed=5)
    for block in plan.blocks:
        expected = plain(sampler, separable, cut(block).contiguous(), block_seed(5, block))
        assert torch.equal(out[..., block.rows, block.columns], expected)
    if sampler.__name__.removeprefix("sample_") in ORDINARY:
        assert torch.equal(out, plain(sampler, separable, NOISE))


def test_blocks_draw_noise_of_their_own(k_sampling):
    plan = make_plan(12, 8, STEPS, window=8, overlap=4, lag=1)
    silent = {"s_noise": 0.0}
    drift = rolled(plan, separable, k_sampling.sample_euler_ancestral, options=silent)
    drawn = [rolled(plan, separable, k_sampling.sample_euler_ancestral, seed=seed) - drift for seed in (1, 2)]
    parts = [draws[..., b.rows, b.columns] for draws in drawn for b in plan.blocks]
    assert all(part.abs().max() > 0.01 for part in parts)
    assert not any(torch.equal(a, b) for a, b in combinations(parts, 2))


@mark.parametrize("draft", [1, 3, 5])
def test_waiting_blocks_stand_where_the_next_step_begins(sampler, draft):
    model = Canvas(separable)
    plan = make_plan(12, 8, STEPS, window=8, overlap=4, draft=draft)
    for _ in rollout(plan, model, sampler, SIGMAS, cut):
        pass
    assert len(model.waited) == len(plan.blocks)
    torch.testing.assert_close(torch.stack(model.waited), SIGMAS[draft].expand(len(plan.blocks)), rtol=1e-12, atol=0)


@mark.parametrize("draft", [0, 2])
@mark.parametrize("lag", [0, 1, 3, "autoregressive"])
def test_the_total_is_known_from_the_first_tick(sampler, lag, draft):
    frames = []
    plan = make_plan(12, 8, STEPS, window=8, overlap=4, lag=lag, draft=draft)
    rolled(plan, coupled, sampler, callback=frames.append)
    assert {frame.total for frame in frames} == {len(frames)}
    assert [frame.tick for frame in frames] == list(range(len(frames)))
    once = ("euler", "lms", "dpmpp_2m", "euler_ancestral", "dpmpp_2m_sde")
    if sampler.__name__.removeprefix("sample_") in once:
        assert len(frames) == plan.ticks
        assert all([b.index for b in f.blocks] == list(plan.moving(f.tick)) for f in frames)
    else:
        assert len(frames) > plan.ticks


@mark.parametrize("name", ["dpm_fast", "dpm_adaptive"])
def test_samplers_that_choose_their_own_levels_are_refused(k_sampling, name):
    with raises(ValueError, match=f"sample_{name} chooses its own noise levels"):
        rollout(ONE, Canvas(coupled), getattr(k_sampling, f"sample_{name}"), SIGMAS, cut)
