"""At one block, or with lag 0, roll(pipe) is the pipeline: difference 0. Blocks apart are each the pipeline, too."""

import numpy as np
import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FlowMatchLCMScheduler,
    UniPCMultistepScheduler,
)
from tiny_families import MAKERS, ROLL, SIDE, draw, make
from tiny_pipeline import LENGTH, call, pipeline

from rolling_diffusion.pipeline import roll

LAG_0 = {"lag": 0, "window": 8, "overlap": 4}
ALONE = {"one block": {}, "lag 0": LAG_0, "lag 0, tiles": {**LAG_0, "order": "spiral-out"}}
ALONE["lag 0, decided late"] = {**LAG_0, "order": "difficulty", "extrapolation": 0.5}
WAYS = [{"draft": 0}, {"draft": 2, "order": "spiral-out"}, {"lag": "autoregressive"}]
WAYS += [{"draft": 2, "order": "difficulty", "extrapolation": 0.5}]


@pytest.mark.parametrize("name", MAKERS)
def test_one_block_and_lag_0_are_the_pipeline_and_several_blocks_are_not(name):
    pipe, arguments = make(name)
    expected = draw(pipe, arguments)
    for way in ALONE.values():
        assert torch.equal(draw(roll(pipe), arguments, **way), expected)
    rolled = draw(roll(pipe), arguments, **ROLL)
    assert rolled.shape == expected.shape and rolled.isfinite().all()
    assert not torch.equal(rolled, expected)
    assert torch.equal(draw(pipe, arguments), expected), "the pipeline is as it was"


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", MAKERS)
def test_blocks_that_do_not_see_each_other_are_each_what_the_pipeline_makes_of_them(name, way):
    """A model without attention: where every token is on its own, a staggered run is the pipeline's own result.

    Up to 1e-5: a matrix product of fewer rows need not round as one of more does.
    """
    pipe, arguments = make(name)
    for model in (pipe.transformer, *([pipe.controlnet] if hasattr(pipe, "controlnet") else [])):
        for part, module in model.named_modules():
            if part.endswith(("to_v", "add_v_proj")):
                for parameter in module.parameters():
                    parameter.data.zero_()
            if part.endswith("to_qkv_mlp_proj"):
                module.weight.data[2 * model.inner_dim : 3 * model.inner_dim] = 0
    expected = draw(pipe, arguments)
    assert (draw(roll(pipe), arguments, **ROLL | way) - expected).abs().max() < 1e-5


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("kind", ["pil", "np", "pt"])
def test_output_types(name, kind):
    pipe, arguments = make(name)
    a, b = (draw(way, arguments, output_type=kind) for way in (pipe, roll(pipe)))
    assert type(a) is type(b)
    assert np.array_equal(np.asarray(a[0]), np.asarray(b[0]))
    (again,) = roll(pipe)(
        **arguments | {"output_type": kind, "generator": torch.Generator().manual_seed(1)}, return_dict=False
    )
    assert np.array_equal(np.asarray(again[0]), np.asarray(a[0]))


@pytest.mark.parametrize("name", MAKERS)
def test_other_shapes_and_several_pictures_at_once(name):
    pipe, arguments = make(name)
    if "image" not in arguments:
        for height, width in ((16, 24), (24, 16)):
            more = {"height": height, "width": width}
            assert torch.equal(draw(roll(pipe), arguments, **more, **LAG_0), draw(pipe, arguments, **more))
    two = {k: torch.cat([v, v.flip(1)]) if "embeds" in k else v for k, v in arguments.items()}
    if "Img2Img" in name:  # diffusers wants a picture for each generator
        two["image"] = [two["image"]] * 2
    expected = draw(pipe, two)
    assert len(expected) == 2
    assert torch.equal(draw(roll(pipe), two, **LAG_0), expected)
    lists = [{"generator": [torch.Generator().manual_seed(i) for i in (5, 6)]} for _ in range(2)]
    assert torch.equal(draw(roll(pipe), two, **lists[0]), draw(pipe, two, **lists[1]))
    rolled = draw(roll(pipe), two, **ROLL)
    assert rolled.shape == expected.shape and not torch.equal(rolled[:1], rolled[1:])


@pytest.mark.parametrize(
    "more", [{}, {"negative_prompt": "ugly", "true_cfg_scale": 3.0}], ids=["one branch", "true cfg"]
)
@pytest.mark.parametrize("guidance", [False, True], ids=["plain", "distilled"])
@pytest.mark.parametrize("way", ALONE)
def test_prompts_in_words_with_and_without_true_cfg(guidance, more, way):
    pipe = pipeline(guidance)
    more = {"guidance_scale": 2.5, **more}
    assert torch.equal(call(pipe, **more), call(roll(pipe), **more, **ALONE[way]))


@pytest.mark.parametrize("size", [(16, 16), (8, 24), (24, 8), (19, 13)])
def test_sizes_that_are_no_multiples(size):
    pipe = pipeline(True)
    height, width = size
    assert torch.equal(call(pipe, height=height, width=width), call(roll(pipe), height=height, width=width, **LAG_0))


def test_batches_of_prompts():
    pipe = pipeline(True)
    prompts = ["a red ball", "a blue boat"]
    for more in (
        {"prompt": prompts},
        {"prompt": prompts, "num_images_per_prompt": 2},
        {"prompt": prompts, "negative_prompt": ["ugly", "a tree"], "true_cfg_scale": 2.0},
        {"prompt_2": "a blue tree"},
    ):
        assert torch.equal(call(pipe, **more), call(roll(pipe), **more, **LAG_0)), more


def test_embeddings_latents_and_sigmas_of_the_callers():
    pipe = pipeline()
    embeds, pooled, _ = pipe.encode_prompt("a red boat", max_sequence_length=LENGTH)
    given = {"prompt_embeds": embeds.detach(), "pooled_prompt_embeds": pooled.detach()}
    latents = torch.randn(1, 16 * 12 // 4, 16, generator=torch.Generator().manual_seed(2))
    for more in (given, {"latents": latents}, {"sigmas": [1.0, 0.6, 0.3], "num_inference_steps": 3}):
        assert torch.equal(call(pipe, **more), call(roll(pipe), **more, **LAG_0))


def test_half_precision():
    pipe = pipeline(True).to(dtype=torch.bfloat16)
    more = {"negative_prompt": "ugly", "true_cfg_scale": 3.0}
    assert torch.equal(call(pipe, **more), call(roll(pipe), **more, **LAG_0))
    rolled = call(roll(pipe), **more, window=8, overlap=4, draft=1)
    assert rolled.dtype == torch.bfloat16 and rolled.isfinite().all()


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
    pipe = pipeline(dynamic=False)
    pipe.scheduler = type(SCHEDULERS[name]).from_config(SCHEDULERS[name].config)
    results = []
    for way, rolling in ((pipe, {}), (roll(pipe), LAG_0)):
        torch.manual_seed(7)
        results.append(call(way, **rolling, num_inference_steps=6))
    assert torch.equal(*results)
    assert call(roll(pipe), window=8, overlap=4, draft=2, num_inference_steps=6).isfinite().all()


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_schedulers_of_two_calls_a_step(shift):
    """Heun's, on Stable Diffusion 3: FluxPipeline hands over noise levels, which it does not take."""
    pipe, arguments = make("StableDiffusion3Pipeline")
    pipe.scheduler = FlowMatchHeunDiscreteScheduler(shift=shift)
    assert torch.equal(draw(roll(pipe), arguments, **LAG_0), draw(pipe, arguments))
    ticks = []
    draw(roll(pipe), arguments, **ROLL, lag="autoregressive", on_tick=ticks.append)
    assert [len(t.blocks) for t in ticks[:3]] == [4, 4, 1]
    assert len(ticks) == 2 + 4 * 5, "a step is two calls, in the draft too; the last one is one"


def test_an_inpainted_picture_keeps_what_is_not_masked_and_a_start_acts():
    pipe, arguments = make("FluxInpaintPipeline")
    known = draw(pipe, arguments, strength=0.26)  # one step of four
    rolled = draw(roll(pipe), arguments, **ROLL | {"draft": 0})
    rows = SIDE // 3 // 2 - 1  # of tokens above the mask
    kept = slice(0, rows * (SIDE - 8) // 2)
    assert torch.allclose(rolled[:, kept], known[:, kept], atol=1e-6)
    pipe, arguments = make("FluxImg2ImgPipeline")
    weak, strong = (draw(roll(pipe), arguments, **ROLL | {"draft": 0}, strength=s) for s in (0.5, 1.0))
    assert not torch.equal(weak, strong)
