"""Faults that were found once, each with the smallest input, and what is right."""

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from tiny_families import ROLL, draw, make

from rolling_diffusion import roll
from rolling_diffusion.models.flux2 import Flux2

NOISY = ROLL | {"order": "random", "context_noise": 0.2, "attention_persistence": 0.7}


def levels(pipe, arguments, **options):
    """Every noise level that a block stands at in a call, the highest first."""
    ticks = []
    draw(roll(pipe), arguments, on_tick=ticks.append, **options)
    return sorted({sigma for tick in ticks for sigma in tick.sigmas}, reverse=True)


def test_the_shift_of_noise_levels_stops_at_the_models_own_limit_when_a_larger_canvas_rolls():
    pipe, arguments = make("FluxPipeline")
    small = {"base_image_seq_len": 16, "max_image_seq_len": 32}  # the canvas has 192 tokens
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, **small)
    limit = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    limit.set_timesteps(sigmas=np.linspace(1, 1 / 4, 4), mu=1.15)
    assert np.allclose(levels(pipe, arguments, **ROLL), limit.sigmas[:-1], atol=1e-6)
    for said in ({"draft": 3}, {"lag": 2, "draft": 1}, {"order": "difficulty", "draft": 2}):  # fit 4 steps
        assert levels(pipe, arguments, **ROLL | said)
    assert levels(pipe, arguments, lag=0)[-1] > 0.97  # the pipeline itself goes on: the picture becomes one step
    assert torch.equal(draw(roll(pipe), arguments, lag=0), draw(pipe, arguments))
    assert 3 < Flux2(None).most_shift({}) < 4
    # A model whose scheduler does not shift by the size has no limit, nor has a shift that was asked for.
    pipe, arguments = make("StableDiffusion3Pipeline")
    shifting = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    pipe = StableDiffusion3Pipeline(**{**pipe.components, "scheduler": shifting})
    pipe.set_progress_bar_config(disable=True)
    limit.set_timesteps(4, mu=3.0)
    assert np.allclose(levels(pipe, arguments, **ROLL, mu=3.0), limit.sigmas[:-1], atol=1e-6)


@pytest.mark.parametrize("options", [NOISY, {"lag": 0}], ids=["rolling", "one block"])
@pytest.mark.parametrize("sampler", ["lcm", "dpmpp_2m_sde"])
@pytest.mark.parametrize("name", ["FluxInpaintPipeline"])
def test_a_seed_is_a_picture_whatever_draws_and_the_default_random_state_stays(name, sampler, options):
    pipe, arguments = make(name)
    options = options | {"sampler": sampler}
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first = draw(roll(pipe), arguments, **options)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(4)
    assert torch.equal(draw(roll(pipe), arguments, **options), first)
    assert not torch.equal(draw(roll(pipe), arguments, seed=2, **options), first)

    def several(*seeds):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        both = arguments | {"generator": generators, "num_images_per_prompt": len(seeds)}
        return roll(pipe)(**both, **options).images

    pictures = several(5, 6)
    torch.manual_seed(7)
    assert torch.equal(several(5, 6), pictures)
    assert not torch.allclose(*pictures, atol=1e-3)


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "uni_pc", "heun", "lcm"])
@pytest.mark.parametrize("name", ["FluxImg2ImgPipeline", "FluxInpaintPipeline", "StableDiffusion3InpaintPipeline"])
def test_pictures_are_started_from_with_every_sampler(name, sampler):
    """Some of diffusers' solvers cannot noise a picture by themselves."""
    pipe, arguments = make(name)
    found = draw(roll(pipe), arguments, **ROLL, sampler=sampler)
    assert found.isfinite().all()
    assert not torch.allclose(found, draw(roll(pipe), arguments, **ROLL), atol=1e-4)
    if "Inpaint" in name:  # what is not masked is the same, whichever sampler draws the rest
        kept = (slice(None), slice(48)) if "Flux" in name else (..., slice(8), slice(None))
        assert torch.allclose(found[kept], draw(roll(pipe), arguments, **ROLL)[kept], atol=1e-5)


def test_numpy_integers_pass_and_no_steps_are_refused():
    pipe, arguments = make("FluxPipeline")
    whole = {"window": 16, "overlap": 8, "draft": 1, "lookahead": 8, "lag": 2, "num_inference_steps": 4}
    whole["memory_tokens"] = 64
    expected = draw(roll(pipe), arguments, **whole)
    found = draw(roll(pipe), arguments, **{name: np.int64(value) for name, value in whole.items()})
    assert torch.equal(found, expected)
    for rolled in (roll(pipe), roll(pipe, {"trained": True})):  # a card knows how many steps, if nothing is said
        for wrong in (0, np.int64(0), -1, 2.5, True):
            with pytest.raises(ValueError, match="and must be a whole number of at least 1"):
                draw(rolled, arguments, num_inference_steps=wrong)
    for name in ("window", "lag", "memory_tokens"):
        with pytest.raises(ValueError, match=f"{name} is 2.5, and must be a whole number"):
            draw(roll(pipe), arguments, **whole | {name: 2.5})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", ["FluxInpaintPipeline", "Flux2Pipeline", "StableDiffusion3Pipeline"])
def test_the_default_dtype_makes_no_difference(name, dtype):
    pipe, arguments = make(name)
    stock, expected = draw(pipe, arguments), draw(roll(pipe), arguments, **NOISY)
    torch.set_default_dtype(dtype)
    try:
        assert torch.equal(draw(roll(pipe), arguments, **NOISY), expected)
        assert torch.equal(draw(roll(pipe), arguments, lag=0), stock)
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_picture_that_is_not_finite_is_refused():
    pipe, arguments = make("FluxPipeline")
    for options in (ROLL, {"lag": 0}):
        with pytest.raises(ValueError, match="the picture is not finite"):
            draw(roll(pipe), arguments | {"prompt_embeds": arguments["prompt_embeds"] * torch.nan}, **options)
