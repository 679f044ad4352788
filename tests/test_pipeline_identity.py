"""With lag 0, or one block, RollingFluxPipeline is FluxPipeline: difference 0."""

import numpy as np
import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchLCMScheduler,
    UniPCMultistepScheduler,
)
from tiny_pipeline import LENGTH, ROLL, call, pipelines

LAG_0 = {"lag": 0, "window": 4, "overlap": 2, "draft": 0}
NEGATIVE = {"negative_prompt": "ugly", "true_cfg_scale": 3.0}


@pytest.mark.parametrize("more", [{}, NEGATIVE], ids=["one branch", "true cfg"])
@pytest.mark.parametrize("guidance", [False, True], ids=["plain", "distilled"])
@pytest.mark.parametrize("rolling", [{}, LAG_0, {**LAG_0, "order": "spiral-out"}], ids=["one block", "strips", "tiles"])
def test_equals_flux_pipeline(guidance, more, rolling):
    stock, roll = pipelines(guidance)
    more = {"guidance_scale": 2.5, **more}
    assert torch.equal(call(stock, **more), call(roll, **more, **rolling))
    assert not torch.equal(call(stock, **more), call(roll, **more, **ROLL)), "a rolling run is another picture"


@pytest.mark.parametrize("size", [(16, 16), (8, 24), (24, 8), (19, 13)])
def test_sizes(size):
    stock, roll = pipelines(True)
    height, width = size
    assert torch.equal(
        call(stock, height=height, width=width), call(roll, height=height, width=width, lag=0, window=4, overlap=2)
    )


def test_batches_images_per_prompt_and_generator_lists():
    stock, roll = pipelines(True)
    prompts = ["a red ball", "a blue boat"]
    for more in (
        {"prompt": prompts},
        {"prompt": prompts, "num_images_per_prompt": 2},
        {"prompt": prompts, "generator": [torch.Generator().manual_seed(i) for i in (5, 6)]},
        {"prompt": prompts, "negative_prompt": ["ugly", "a tree"], "true_cfg_scale": 2.0},
        {"prompt_2": "a blue tree"},
    ):
        results = []
        for pipe, rolling in ((stock, {}), (roll, LAG_0)):
            if isinstance(more.get("generator"), list):
                more["generator"] = [torch.Generator().manual_seed(i) for i in (5, 6)]
            results.append(call(pipe, **more, **rolling))
        assert torch.equal(*results), more


def test_embeddings_latents_and_sigmas_of_the_callers():
    stock, roll = pipelines()
    embeds, pooled, _ = stock.encode_prompt("a red boat", max_sequence_length=LENGTH)
    given = {"prompt_embeds": embeds.detach(), "pooled_prompt_embeds": pooled.detach()}
    latents = torch.randn(1, 16 * 12 // 4, 16, generator=torch.Generator().manual_seed(2))
    for more in (given, {"latents": latents}, {"sigmas": [1.0, 0.6, 0.3], "num_inference_steps": 3}):
        assert torch.equal(call(stock, **more), call(roll, **more, **LAG_0))
    with pytest.raises(ValueError, match="latents has shape"):
        call(roll, latents=latents[:, 1:])


@pytest.mark.parametrize("kind", ["pil", "np", "pt", "latent"])
def test_output_types(kind):
    stock, roll = pipelines()
    a, b = call(stock, output_type=kind), call(roll, output_type=kind, **LAG_0)
    assert type(a) is type(b)
    assert np.array_equal(np.asarray(a[0]), np.asarray(b[0]))


def test_half_precision():
    for pipe in (pair := pipelines(True)):
        pipe.to(dtype=torch.bfloat16)
    assert torch.equal(call(pair[0], **NEGATIVE), call(pair[1], **NEGATIVE, **LAG_0))


FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
SCHEDULERS = {
    "euler, static shift": FlowMatchEulerDiscreteScheduler(shift=3.0),
    "euler, dynamic shift": FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
    "euler, karras": FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, use_karras_sigmas=True),
    "euler, exponential": FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, use_exponential_sigmas=True),
    "euler, beta": FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, use_beta_sigmas=True),
    "euler, stochastic": FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, stochastic_sampling=True),
    "lcm": FlowMatchLCMScheduler(use_dynamic_shifting=True),
    "dpm++": DPMSolverMultistepScheduler(**FLOW, use_dynamic_shifting=True),
    "dpm++, third order": DPMSolverMultistepScheduler(**FLOW, use_dynamic_shifting=True, solver_order=3),
    "dpm++ sde": DPMSolverMultistepScheduler(**FLOW, use_dynamic_shifting=True, algorithm_type="sde-dpmsolver++"),
    "unipc": UniPCMultistepScheduler(**FLOW, use_dynamic_shifting=True),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_of_the_pipeline(name):
    """Also those whose timesteps are rounded to integers, and those that draw noise."""
    stock, roll = pipelines(dynamic=False)
    results = []
    for pipe, rolling in ((stock, {}), (roll, LAG_0)):
        pipe.scheduler = type(SCHEDULERS[name]).from_config(SCHEDULERS[name].config)
        torch.manual_seed(7)
        results.append(call(pipe, **rolling, num_inference_steps=6))
    assert torch.equal(*results)
    assert call(roll, **ROLL, num_inference_steps=6).isfinite().all()
