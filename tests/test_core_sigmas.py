"""Noise levels, against k-diffusion's own schedules and diffusers' shift."""

import math

import torch
from hypothesis import given
from hypothesis import strategies as st
from pytest import approx, mark, raises

from rolling_diffusion.core.sigmas import SPACINGS, flux_shift, sigmas


@given(st.sampled_from(SPACINGS), st.integers(1, 60), st.floats(0.1, 12))
def test_they_fall_from_one_to_zero(name, steps, shift):
    levels = sigmas(name, steps, shift)
    assert levels.shape == (steps + 1,) and levels.dtype == torch.float32
    assert levels[0] == 1 and levels[-1] == 0
    assert (levels[1:] < levels[:-1]).all()


def test_uniform_levels_are_shifted_as_diffusers_does():
    import numpy as np
    from diffusers.schedulers import FlowMatchEulerDiscreteScheduler

    for shift in (1.0, 3.0):
        scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
        scheduler.set_timesteps(sigmas=np.linspace(1, 1 / 20, 20).tolist())
        torch.testing.assert_close(sigmas("uniform", 20, shift), scheduler.sigmas, rtol=1e-6, atol=0)


@mark.parametrize("name", ["karras", "exponential", "polyexponential"])
@mark.parametrize("steps", [2, 5, 20])
def test_spacings_are_those_of_k_diffusion(k_sampling, name, steps):
    own = sigmas(name, steps, shift=3)
    expected = getattr(k_sampling, f"get_sigmas_{name}")(steps, float(own[-2]), float(own[0]))
    torch.testing.assert_close(own, expected, rtol=2e-5, atol=0)


def test_flux_shift_is_that_of_its_pipeline():
    assert math.log(flux_shift(256)) == approx(0.5)
    assert math.log(flux_shift(4096)) == approx(1.15)


@mark.parametrize(
    ("change", "message"),
    [
        ({"name": "cosine"}, "unknown spacing 'cosine': choose one of uniform, karras"),
        ({"steps": 0}, "steps is 0"),
        ({"shift": 0}, "shift is 0, and must be above 0"),
        ({"shift": math.inf}, "shift is inf"),
    ],
)
def test_bad_input_is_refused(change, message):
    with raises(ValueError, match=message):
        sigmas(**change)
