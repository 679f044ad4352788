"""A guide: the whole picture drawn small, and enlarged in place of the draft."""

import re

import pytest
import torch
from tiny_families import TEXT_TO_IMAGE, apart, draw, make, picture

from rolling_diffusion import Block, Card, make_plan, plan_for, roll

SMALL = Card(size=32, steps=4, window=16, overlap=8, native_tokens=48)  # of 192 on a canvas of 32 × 24


@pytest.mark.parametrize("name", TEXT_TO_IMAGE)
def test_above_the_model_s_size_a_small_picture_takes_the_place_of_the_draft(name):
    pipe, arguments = make(name)
    rolled, ticks = roll(pipe, SMALL), []
    guided = draw(rolled, arguments, on_tick=ticks.append)
    plan = plan_for(SMALL, 32, 24, 4, guide="auto")
    assert plan.guide == (16, 12) and plan.draft == 2
    assert [t.number for t in ticks] == list(range(2, plan.ticks)), "the draft's ticks are not run"
    assert torch.equal(guided, draw(rolled, arguments, guide=True))
    assert apart(guided, draw(rolled, arguments, guide=False)) > 0.1


def test_kontext_which_sizes_its_pictures_itself_is_guided_too():
    pipe, arguments = make("FluxKontextPipeline")
    rolled, ticks = roll(pipe, SMALL), []
    guided = draw(rolled, arguments, on_tick=ticks.append)
    assert ticks[0].number == ticks[0].plan.draft and ticks[0].plan.guide
    assert apart(guided, draw(rolled, arguments, guide=False)) > 0.1


def test_the_guide_settles_the_whole_of_the_picture():
    """The fewer noise is left after the draft, the closer the picture is to its guide."""
    pipe, arguments = make("FluxPipeline")
    rolled = roll(pipe, SMALL)
    small = draw(pipe, arguments | {"height": 16, "width": 12, "num_inference_steps": 8})
    enlarged = rolled.family.enlarged(small, (16, 12), (32, 24))
    far = [apart(enlarged, draw(rolled, arguments, num_inference_steps=8, draft=d, guide=True)) for d in (1, 7)]
    assert far[1] < 0.5 * far[0]


def test_a_picture_may_be_the_guide():
    pipe, arguments = make("FluxPipeline")
    rolled = roll(pipe, SMALL)
    drawn = draw(rolled, arguments, guide=picture())
    assert not torch.equal(drawn, draw(rolled, arguments, guide=picture(1)))
    assert not torch.equal(drawn, draw(rolled, arguments))


@pytest.mark.parametrize("sampler", [None, "heun", "dpmpp_2m"])
@pytest.mark.parametrize("name", TEXT_TO_IMAGE)
def test_the_steps_after_a_guide_take_all_of_its_noise(name, sampler):
    """A model whose velocity is 1 everywhere moves whatever it is given by its noise level, in all steps together."""
    pipe, arguments = make(name)
    pipe.transformer.proj_out.register_forward_hook(lambda module, inputs, output: torch.ones_like(output))
    rolled, ticks = roll(pipe, SMALL), []
    noise = torch.randn(draw(pipe, arguments).shape, generator=torch.Generator().manual_seed(3))
    said = {"sampler": sampler} if sampler else {}
    own = noise.mT.unflatten(2, (16, 12)) if name == "Flux2Pipeline" else noise
    drawn = draw(rolled, arguments, latents=own, guide=picture(), on_tick=ticks.append, **said)
    pixels = pipe.image_processor.preprocess(picture(), arguments["height"], arguments["width"])
    sigma = ticks[0].sigmas[0]
    begun = rolled.family.encode(pipe, pixels).lerp(noise, sigma)
    assert 0.2 < sigma < 0.98 and torch.allclose(drawn, begun - sigma, atol=1e-4)


def test_an_own_order_of_blocks_and_a_stop_reach_the_guide():
    pipe, arguments = make("FluxPipeline")
    rolled = roll(pipe, SMALL)
    own = [Block(i, top, 0, 8, 24) for i, top in enumerate(range(0, 32, 8))]
    assert draw(rolled, arguments, order=own).isfinite().all()
    seen = []

    def stop(module, inputs, options):
        seen.append(options["hidden_states"].shape[1])
        pipe._interrupt = True

    hook = pipe.transformer.register_forward_pre_hook(stop, with_kwargs=True)
    draw(rolled, arguments)
    hook.remove()
    assert seen[0] == 48 and len(seen) == 3 and not vars(pipe).get("_interrupt")  # and what the first tick takes


def test_places_of_prompts_are_refused_before_the_guide_is_drawn(rolled):
    guided = roll(rolled.pipe, SMALL)
    for place, words in [((0, 0, 64), "must be pixels (left"), ("abcd", "must be a share"), ((0, 0, 9999, 8), "9999")]:
        with pytest.raises(ValueError, match=re.escape(words)):
            guided([(0.0, "a"), (place, "b")], height=256, width=256)


def test_what_is_said_of_the_draft_or_the_lag_stands():
    pipe, arguments = make("FluxPipeline")
    rolled = roll(pipe, SMALL)
    for said in ({"draft": 2}, {"lag": 0}, {"lag": 2}):
        assert torch.equal(draw(rolled, arguments, **said), draw(rolled, arguments, **said, guide=False))
    assert torch.equal(draw(roll(pipe), arguments), draw(roll(pipe), arguments, guide=False)), "not above its own size"


@pytest.mark.parametrize(
    ("name", "options", "sentence"),
    [
        ("FluxPipeline", {"guide": True, "lag": 0}, "guide needs a canvas larger"),
        ("FluxPipeline", {"guide": True, "draft": 0}, "guide needs a canvas larger"),
        ("FluxImg2ImgPipeline", {"guide": True}, "FluxImg2ImgPipeline cannot be guided"),
    ],
)
def test_where_no_guide_can_be(name, options, sentence):
    pipe, arguments = make(name)
    with pytest.raises(ValueError, match=sentence):
        draw(roll(pipe, SMALL), arguments, **options)


def test_a_plan_counts_its_guide():
    plan = make_plan(64, 64, 10, window=32, overlap=16, draft=5, guide=(32, 32))
    cost, plain = plan.cost(8), make_plan(64, 64, 10, window=32, overlap=16, draft=5).cost(8)
    assert (cost.guide, cost.ticks) == (10, plain.ticks - 5)
    assert cost.token_evaluations == plain.token_evaluations - 5 * (1024 + 8) + 10 * (256 + 8)
    assert cost.pairs == plain.pairs - 5 * (1024 + 8) ** 2 + 10 * (256 + 8) ** 2
    assert "10 for a guide of 32 × 32 cells" in str(plan)
    for guide in ((64, 64), (3, 4), (0, 2)):
        with pytest.raises(ValueError, match="guide"):
            make_plan(64, 64, 10, guide=guide)
