"""Rolling runs: ticks, callbacks, interrupts, memory, named schedulers, guidance, and the sentences of errors."""

import gc
import io
import weakref

import numpy as np
import pytest
import torch
from own_memory import counted
from PIL import Image
from tiny_families import WITH_CONTROL, draw, make
from tiny_pipeline import call, pipeline

from rolling_diffusion.appearing import Veil
from rolling_diffusion.core import memory as core_memory
from rolling_diffusion.core.guidance import BOUND, project
from rolling_diffusion.core.memory import Memory
from rolling_diffusion.core.order import Block, make_order
from rolling_diffusion.defaults import Card
from rolling_diffusion.models.flux import unpack
from rolling_diffusion.pipeline import SAMPLERS, SPACINGS, roll, run
from rolling_diffusion.pipeline.space import OutOfMemory

ROLL = {"window": 8, "overlap": 4, "draft": 0}  # on 16 × 12 cells: 4 strips of 4, lag 2 of 4 steps
LAG_0 = {"lag": 0, "window": 4, "overlap": 2}


@pytest.fixture(scope="module")
def pipe():
    return pipeline(True)


@pytest.fixture(scope="module")
def rolled(pipe):
    return roll(pipe)


def test_every_tick_is_one_callback_and_one_unit_of_progress_and_shows_the_whole_canvas(monkeypatch):
    pipe = pipeline(True)
    rolled = roll(pipe)
    told, ticks, bars = [], [], []
    shown = type(pipe).progress_bar

    def progress_bar(self, iterable=None, total=None):
        bars.append(shown(self, iterable, total))
        return bars[-1]

    def on_step(pipe, number, timestep, tensors):
        told.append((number, float(timestep), tensors["latents"].shape))
        assert pipe.num_timesteps == 10
        return {}

    monkeypatch.setattr(type(pipe), "progress_bar", progress_bar)
    pipe.set_progress_bar_config(file=io.StringIO())
    final = call(rolled, **ROLL, callback_on_step_end=on_step, on_tick=ticks.append)
    assert [number for number, *_ in told] == list(range(10)) == [t.number for t in ticks]
    assert ticks[-1].total == 10, "4 steps and 3 more blocks, each 2 ticks later"
    assert all(shape == (1, 48, 16) for *_, shape in told)
    assert told[0][1] == pytest.approx(1000)
    assert (bars[0].total, bars[0].n) == (10, 10)
    # At the last step x0 is the result, since the next level is 0.
    assert torch.allclose(ticks[-1].canvas[:, :, 12:], unpack(final, 16, 12)[:, :, 12:], atol=1e-6)
    assert ticks[-1].blocks[0].top == 12 and ticks[-1].sigmas[0] < ticks[0].sigmas[0]
    picture = rolled.preview(ticks[-1])
    assert isinstance(picture, Image.Image) and picture.size == (12, 16)


@pytest.mark.parametrize("rolling", [LAG_0, ROLL], ids=["lag 0", "rolling"])
def test_callbacks_change_latents_and_embeddings(pipe, rolled, rolling):
    def quieten(pipe, i, t, tensors):
        latents = tensors["latents"] if i < pipe.num_timesteps - 1 else torch.zeros_like(tensors["latents"])
        return {"latents": latents, "prompt_embeds": 0.5 * tensors["prompt_embeds"]}

    more = {"callback_on_step_end": quieten, "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"]}
    assert call(rolled, **rolling, **more).abs().sum() == 0, "the last callback's latents are the result"

    def half(pipe, i, t, tensors):
        return {"latents": 0.9 * tensors["latents"], "prompt_embeds": 0.5 * tensors["prompt_embeds"]}

    more["callback_on_step_end"] = half
    changed = call(rolled, **rolling, **more)
    assert not torch.equal(changed, call(rolled, **rolling))
    if rolling is LAG_0:
        assert torch.equal(changed, call(pipe, **more))


@pytest.mark.parametrize("rolling", [LAG_0, ROLL], ids=["lag 0", "rolling"])
def test_an_interrupt_ends_after_its_tick_with_the_canvas_as_it_stands(pipe, rolled, rolling):
    ticks = []

    def stop(pipe, i, t, tensors):
        ticks.append(i)
        pipe._interrupt = i == 1
        return {}

    stopped = call(rolled, **rolling, callback_on_step_end=stop)
    assert ticks == [0, 1]
    if rolling is LAG_0:
        assert torch.equal(stopped, call(pipe, callback_on_step_end=stop))
    else:
        noise, _ = pipe.prepare_latents(
            1, 4, 16, 12, torch.float32, torch.device("cpu"), torch.Generator().manual_seed(1)
        )
        assert torch.equal(stopped[:, 12:], noise[:, 12:]), "blocks that wait are still noise"
        assert not torch.equal(stopped[:, :12], noise[:, :12])
    assert torch.equal(call(rolled, **rolling), call(rolled, **rolling)), "the next run is whole"


def test_an_exception_in_a_callback_ends_the_run_and_nothing_is_left_of_it(rolled):
    def fail(*_):
        raise KeyError("mine")

    before = call(rolled, **ROLL)
    for more in ({"callback_on_step_end": fail}, {"on_tick": fail}):
        with pytest.raises(KeyError, match="mine"):
            call(rolled, **ROLL, **more)
        assert torch.is_grad_enabled()
    assert torch.equal(call(rolled, **ROLL), before)


def test_memory_acts_has_a_cap_and_is_freed(rolled, monkeypatch):
    seen: list[weakref.ref] = []
    tokens: list[int] = []
    put = Memory.put

    def watched(self, kind, block, layer, key, value):
        put(self, kind, block, layer, key, value)
        seen.append(weakref.ref(self))
        tokens.append(self.tokens)

    full = call(rolled, **ROLL)
    assert not torch.equal(call(rolled, **ROLL, attention_persistence=0), full)
    assert not torch.equal(call(rolled, **ROLL, attention_persistence=0.5), full)
    assert not torch.equal(call(rolled, **ROLL, lookahead=0), full)
    assert torch.equal(call(rolled, **ROLL, lookahead="all"), call(rolled, **ROLL, lookahead=None))
    assert torch.equal(call(rolled, **ROLL, memory_tokens=48), full), "a cap of the whole canvas changes nothing"
    assert torch.equal(call(rolled, **ROLL, memory_device="cpu"), full)
    assert not torch.equal(call(rolled, **ROLL, memory_tokens=12), full)
    monkeypatch.setattr(Memory, "put", watched)
    call(rolled, **ROLL, attention_persistence=0, lookahead=0)
    assert not seen, "no memory, no cost"
    call(rolled, **ROLL)
    assert max(tokens) <= 48
    gc.collect()
    assert seen
    assert all(ref() is None or ref().tokens == 0 for ref in seen)


@pytest.mark.parametrize("persistence, lookahead", [(1.0, "all"), (0.2, 2), (0.0, "all"), (1.0, 0)])
@pytest.mark.parametrize("name", ["FluxPipeline", "Flux2Pipeline", "StableDiffusion3Pipeline"])
def test_a_run_computes_and_sees_as_many_tokens_as_its_plan_predicts(name, persistence, lookahead, monkeypatch):
    pipe, arguments = make(name)
    calls, plans = [], []
    rolling_call, stock = run.rolling_call, run.Run.answer

    def watched(family, model, request, tokens, size, levels, view, sink, **more):
        calls.append((len(tokens), 0 if view is None else view.layer(0)[0].shape[1], sink is not None))
        return rolling_call(family, model, request, tokens, size, levels, view, sink, **more)

    def answer(self, request):
        if self.tick < self.draft:
            calls.append((192, 0, False))
        plans.append(self.plan)
        return stock(self, request)

    monkeypatch.setattr(run, "rolling_call", watched)
    monkeypatch.setattr(run.Run, "answer", answer)
    for order, draft, lag in (("left-to-right", 0, None), ("spiral-out", 1, "autoregressive"), ("spiral-out", 2, 1)):
        calls.clear()
        way = {"order": order, "draft": draft, "lag": lag, "window": 16, "overlap": 8}
        draw(roll(pipe), arguments, **way, attention_persistence=persistence, lookahead=lookahead, memory_tokens=9999)
        text = 7
        cost = plans[-1].cost(text)
        assert len(calls) == cost.ticks + cost.waiting_calls + cost.commits
        assert sum(own + text for own, *_ in calls) == cost.token_evaluations
        assert sum((own + text) * (own + text + seen) for own, seen, _ in calls) == cost.pairs
        visible = [own + text + seen for own, seen, kept in calls[draft:] if not kept]
        assert max(visible) == cost.peak_visible_tokens


def test_windows_and_drafts_follow_the_card():
    made = pipeline()
    trained = roll(made, {"draft": 0.0, "window": None, "steps": 8, "size": 16, "max_sequence_length": 8})
    ticks = []
    images = call(trained, height=None, width=None, num_inference_steps=None, on_tick=ticks.append)
    assert images.shape == (1, 64, 16), "16 × 16 pixels"
    assert ticks[0].total == 8 + 3 * 4, "4 strips, lag 4 of 8 steps"
    own = roll(made)
    assert not own.has_card and own.card == Card(size=128), "what the pipeline itself would draw, which is FLUX's"
    with pytest.raises(ValueError, match="the model's card knows no 'tained'"):
        roll(made, {"tained": True})
    with pytest.raises(ValueError, match="the model's card says draft = 2"):
        roll(made, {"draft": 2})


@pytest.mark.parametrize("order", ["left-to-right", "raster", "spiral-out"])
def test_orders(rolled, order):
    ticks = []
    images = call(rolled, **ROLL, order=order, on_tick=ticks.append, output_type="pil", height=16, width=16)
    assert images[0].size == (16, 16)
    assert ticks[0].blocks == (make_order(order, 16, 16, 4)[0],)


def test_an_order_of_the_callers_own(rolled):
    def inward(down, across, seed):
        return sorted(range(down * across), key=lambda i: -abs(2 * (i // across) - down + 1))

    ticks = []
    call(rolled, **ROLL, order=inward, height=16, width=16, on_tick=ticks.append)
    first = [t.blocks[0].top for t in ticks]
    assert first[0] in (0, 12) and first[-1] in (4, 8)
    blocks = [Block(0, 0, 0, 16, 6), Block(1, 0, 6, 16, 10)]
    ticks.clear()
    call(rolled, **ROLL, order=blocks, height=16, width=16, lag="autoregressive", on_tick=ticks.append)
    assert [t.blocks[0] for t in ticks] == [blocks[0]] * 4 + [blocks[1]] * 4
    with pytest.raises(ValueError, match="must cover the canvas"):
        call(rolled, **ROLL, order=blocks[:1], height=16, width=16)


TILES = {"order": "difficulty", "draft": 2, "height": 16, "width": 16, "window": 8, "overlap": 4}


def test_difficulty_is_decided_by_what_the_draft_s_guess_still_changes(pipe, rolled):
    ticks = []
    found = call(rolled, **TILES, on_tick=ticks.append)
    late, decided = ticks[1].plan, ticks[2].plan
    assert late.late and not decided.late and all(t.plan is decided for t in ticks[2:])
    before, now = (t.canvas for t in ticks[:2])
    moved = [(now - before)[..., b.rows, b.columns].square().mean().item() for b in late.blocks]
    assert list(decided.blocks) == list(late.decided(moved).blocks) != list(late.blocks)
    assert [t.blocks[0].index for t in ticks] == sorted(t.blocks[0].index for t in ticks)
    veil = Veil()  # what is seen of it appears in its order
    for t in ticks:
        veil.tell(t)
        assert {b for b in late.blocks if veil.levels[b] == 0} == set(decided.blocks[: t.blocks[0].index])
    assert torch.equal(found, call(rolled, **TILES)), "the same seed, the same picture"
    assert torch.equal(found, call(rolled, **TILES | {"order": list(decided.blocks), "lag": decided.lag}))
    assert torch.equal(call(rolled, **TILES, lag=0), call(pipe, height=16, width=16))
    with pytest.raises(ValueError, match="draft is 1 steps, and the order 'difficulty' needs at least 2"):
        call(rolled, **TILES | {"draft": 1})


@pytest.mark.parametrize("name", ["FluxPipeline", "StableDiffusion3Pipeline"])
def test_difficulty_is_told_by_the_gap_between_two_answers_where_there_are_two(name, monkeypatch):
    """In two calls, or in one of both prompts."""
    pipe, arguments = make(name)
    asked, ticks, forward = [], [], type(pipe.transformer).forward

    def watched(self, *args, **options):
        asked.append(forward(self, *args, **options)[0])
        return (asked[-1],)

    monkeypatch.setattr(type(pipe.transformer), "forward", watched)
    negative = {"negative_prompt_embeds": arguments["prompt_embeds"] / 2, "true_cfg_scale": 3.0}
    negative["negative_pooled_prompt_embeds"] = arguments["pooled_prompt_embeds"] / 2
    guided = negative if name == "FluxPipeline" else {"guidance_scale": 3.0}
    draw(roll(pipe), arguments, **TILES | guided, num_inference_steps=4, on_tick=ticks.append)
    late, decided = ticks[1].plan, ticks[2].plan
    pair = asked[2:4] if name == "FluxPipeline" else asked[1].chunk(2)
    gap = ticks[0]._cells(pair[0] - pair[1])
    apart = [gap[..., b.rows, b.columns].square().mean().item() for b in late.blocks]
    assert list(decided.blocks) == list(late.decided(apart).blocks) != list(late.blocks)


@pytest.mark.parametrize("order", ["raster", "difficulty"])
def test_extrapolation_stores_waiting_blocks_from_further_on(rolled, order, monkeypatch):
    calls = []

    def watched(family, model, request, tokens, size, rows, view, sink, **more):
        if sink is not None:
            calls.append((request["hidden_states"].clone(), rows.timesteps))
        return stock(family, model, request, tokens, size, rows, view, sink, **more)

    stock, given, ticks, found = run.rolling_call, TILES | {"order": order}, [], []
    monkeypatch.setattr(run, "rolling_call", watched)
    for share in (None, 0.0, 0.4):
        found.append(call(rolled, **given, extrapolation=share, on_tick=ticks.append))
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])
    third = len(calls) // 3
    (state, level), (further, told) = calls[0], calls[2 * third]
    guess = ticks[1].latents
    assert torch.allclose(told, 0.6 * level) and torch.allclose(further, state.lerp(guess, 0.4), atol=1e-6)
    for (one, _), (two, _) in zip(calls[1:third], calls[2 * third + 1 :]):
        assert one.shape == two.shape  # no call more, none less


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_named_samplers_step_like_the_pipeline_would_with_that_scheduler(pipe, rolled, sampler, spacing):
    ours = call(rolled, sampler=sampler, scheduler_sigmas=spacing, lag=0)
    assert ours.isfinite().all()
    again = call(rolled, sampler=sampler, scheduler_sigmas=spacing, lag=0)
    assert torch.equal(ours, again), "the same seed, the same picture"
    blocks = call(rolled, sampler=sampler, scheduler_sigmas=spacing, **ROLL)
    assert torch.equal(blocks, call(rolled, sampler=sampler, scheduler_sigmas=spacing, **ROLL))
    assert not torch.equal(blocks, ours)
    if sampler == "euler" and spacing == "simple":
        assert torch.equal(ours, call(pipe))
    if sampler == "euler" and spacing != "simple":
        other = pipeline(True)
        other.scheduler = type(other.scheduler).from_config(other.scheduler.config, **{SPACINGS[spacing]: True})
        assert torch.equal(ours, call(other))


def test_samplers_share_the_levels_of_a_spacing(rolled):
    found = {}
    for spacing in SPACINGS:
        for sampler in SAMPLERS:
            ticks = []
            call(rolled, sampler=sampler, scheduler_sigmas=spacing, lag=0, on_tick=ticks.append, num_inference_steps=5)
            levels = [t.sigmas[0] for t in ticks]
            levels = levels[:1] + levels[1::2] if sampler == "heun" else levels
            assert levels == pytest.approx(found.setdefault(spacing, levels), abs=1e-5)
    assert len({tuple(levels) for levels in found.values()}) == len(SPACINGS)


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"window": 7}, "window is 7 cells"),
        ({"overlap": 64}, "overlap is 64 cells"),
        ({"order": "up"}, "unknown order 'up'"),
        ({"num_inference_steps": -1}, "num_inference_steps is -1, and must be a whole number of at least 1"),
        ({"num_inference_steps": 0}, "num_inference_steps is 0"),
        ({"num_inference_steps": 2.5}, "num_inference_steps is 2.5"),
        ({"draft": 4}, "draft is 4 steps"),
        ({"attention_persistence": 2}, "persistence is 2"),
        ({"cfg": 3, "true_cfg_scale": 2}, "must not be both"),
        ({"cfg": -1}, "cfg is -1"),
        ({"text_level": "least"}, "text_level is 'least'"),
        ({"context_noise": 1.0}, "context_noise is 1.0"),
        ({"lookahead": "far"}, "lookahead is 'far'"),
        ({"sampler": "eulr"}, "unknown sampler 'eulr': choose one of euler, heun"),
        ({"scheduler_sigmas": "linear"}, "unknown spacing of the sigmas 'linear': choose one of simple"),
        ({"windw": 8}, r"takes an argument 'windw' \(did you mean 'window'\?\)"),
        ({"strength": 0.5}, "neither FluxPipeline nor rolling takes an argument 'strength'"),
    ],
)
def test_errors_are_one_sentence(rolled, wrong, sentence):
    with pytest.raises(ValueError, match=sentence) as caught:
        call(rolled, **wrong)
    assert "\n" not in str(caught.value)


def test_arguments_by_place_are_the_pipelines(pipe, rolled):
    more = {"generator": torch.Generator().manual_seed(1), "output_type": "latent", "max_sequence_length": 8}
    size = {"height": 16, "width": 12, "num_inference_steps": 4}
    assert torch.equal(rolled("a red ball", **more, **size).images, call(pipe))
    with pytest.raises(ValueError, match="prompt is given twice"):
        rolled("a red ball", prompt="a blue boat")


def test_pipelines_that_cannot_roll_are_refused():
    class Unet:
        unet = scheduler = None

    with pytest.raises(ValueError, match="Unet has no transformer"):
        roll(Unet())
    pipe, arguments = make("FluxControlNetPipeline")
    with pytest.raises(ValueError, match=r"control_guidance_end is 0\.5, and must be 1\.0"):
        draw(roll(pipe), arguments, control_guidance_end=0.5, window=16, overlap=8)
    half = draw(roll(pipe), arguments, control_guidance_end=0.5, lag=0)
    assert torch.equal(half, draw(pipe, arguments, control_guidance_end=0.5))
    pipe, arguments = make("StableDiffusion3Pipeline")
    with pytest.raises(ValueError, match="skip_guidance_layers acts on some steps only"):
        draw(roll(pipe), arguments, skip_guidance_layers=[1], window=16, overlap=8)


def test_out_of_memory_is_one_sentence_and_frees(rolled, monkeypatch):
    def short(*_, **__):
        raise OutOfMemory("CUDA out of memory.")

    monkeypatch.setattr(run, "rolling_call", short)
    with pytest.raises(OutOfMemory, match="a smaller window") as caught:
        call(rolled, **ROLL)
    assert "\n" not in str(caught.value)
    assert caught.value.__context__ is None and caught.value.__cause__ is None, "nothing holds what the run held"


def test_main_memory_that_runs_out_is_no_other_error(rolled):
    def much(*_):
        torch.empty(2**62, dtype=torch.uint8)

    with pytest.raises(OutOfMemory, match="a smaller window"):
        call(rolled, callback_on_step_end=much, **ROLL)
    with pytest.raises(OutOfMemory, match="a smaller canvas needs less"):
        call(rolled, callback_on_step_end=much, **LAG_0)


def test_cfg_is_a_distilled_models_own_guidance_without_a_negative_prompt(pipe, rolled):
    for empty in ({}, {"negative_prompt": ""}, {"negative_prompt": " "}):
        assert torch.equal(call(rolled, cfg=7.0, **empty, **LAG_0), call(pipe, guidance_scale=7.0))


def test_cfg_on_a_distilled_model_with_a_negative_prompt_is_projected(pipe, rolled):
    plain = call(pipe, guidance_scale=3.5, negative_prompt="ugly", true_cfg_scale=7.0)
    ours = call(rolled, cfg=7.0, negative_prompt="ugly", **LAG_0)
    assert not torch.allclose(ours, plain, atol=1e-4)
    assert not torch.equal(ours, call(rolled, cfg=7.0, negative_prompt="tree", **LAG_0)), "the negative prompt acts"
    assert not torch.equal(call(rolled, cfg=7.0, negative_prompt="ugly", **ROLL), ours)

    # What the pipeline's own formula makes of the answers: p + (s - 1) d, with d as the paper has it.
    made = []
    joined = run.project
    answers = []

    def watched(x0, difference, sigma):
        answers.append((x0, difference, sigma))
        return joined(x0, difference, sigma)

    class Watching(type(pipe.scheduler)):
        def step(self, model_output, timestep, sample, *args, **kwargs):
            made.append((model_output.flatten(1), sample.flatten(1)))
            return super().step(model_output, timestep, sample, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "project", watched)
        other = pipeline(True)
        other.scheduler = Watching.from_config(other.scheduler.config)
        call(roll(other), cfg=7.0, negative_prompt="ugly", **LAG_0)
    for (x0, difference, sigma), (velocity, x) in zip(answers, made, strict=True):
        assert torch.allclose(velocity, (x - x0) / sigma + 6 * joined(x0, difference, sigma), atol=1e-4)


def test_cfg_on_an_undistilled_model_takes_the_empty_prompt_if_there_is_no_other():
    pipe = pipeline()
    rolled = roll(pipe)
    for cfg in (0.0, 1.0):
        assert torch.equal(call(rolled, cfg=cfg, **LAG_0), call(pipe))
    expected = call(pipe, negative_prompt="", true_cfg_scale=4.0)
    assert torch.equal(call(rolled, cfg=4.0, **LAG_0), expected)
    assert torch.equal(
        call(rolled, cfg=4.0, negative_prompt="ugly", prompt=["a red ball", "a tree"], **LAG_0),
        call(pipe, true_cfg_scale=4.0, negative_prompt=["ugly", "ugly"], prompt=["a red ball", "a tree"]),
    )
    carded = roll(pipe, Card(cfg=4.0, max_sequence_length=8))
    assert torch.equal(call(carded, **LAG_0), expected), "the card's"
    assert torch.equal(call(carded, true_cfg_scale=1.0, **LAG_0), call(pipe)), "the pipeline's arguments act as there"


def test_cfg_is_guidance_scale_where_a_pipeline_has_no_other():
    for name in ("StableDiffusion3Pipeline", "Flux2KleinPipeline", "FluxFillPipeline"):
        pipe, arguments = make(name)
        rest = {k: v for k, v in arguments.items() if k != "guidance_scale"}
        assert torch.equal(draw(roll(pipe), rest, cfg=2.0), draw(pipe, rest, guidance_scale=2.0)), name


def test_projected_difference_is_orthogonal_to_x0_and_bounded():
    g = torch.Generator().manual_seed(0)
    x, positive, negative = (torch.randn(3, 500, generator=g) for _ in range(3))
    for sigma in (1.0, 0.3):
        x0 = x - sigma * positive
        step = project(x0, positive - negative, sigma)
        cosine = (step * x0).sum(1) / step.norm(dim=1) / x0.norm(dim=1)
        assert cosine.abs().max() < 1e-5
        assert (sigma * step.square().mean(1).sqrt() <= BOUND * (1 + 1e-5)).all()
        # So however large cfg is taken by a node's default, x0 grows by the bound's share at most.
        guided = x0 - sigma * 6 * step
        assert (guided.norm(dim=1) <= (x0.norm(dim=1) ** 2 + 500 * (6 * BOUND) ** 2).sqrt() * (1 + 1e-5)).all()
    tiny = positive + 1e-4 * negative
    along = x - 0.5 * positive
    expected = (positive - tiny) - ((positive - tiny) * along).sum(1, True) / along.square().sum(1, True) * along
    torch.testing.assert_close(project(along, positive - tiny, 0.5), expected, rtol=1e-3, atol=1e-7)


def test_numpy_numbers_pass_as_in_diffusers(rolled):
    expected = call(rolled, **ROLL)
    found = call(rolled, window=np.int64(8), overlap=np.int32(4), draft=np.int64(0), num_inference_steps=np.int64(4))
    assert torch.equal(found, expected)


def test_what_rolls_on_a_long_canvas_takes_the_same_memory_however_long_it_is(monkeypatch):
    """Finished blocks beyond the model's native size are forgotten, waiting ones not yet stored."""
    rolled = roll(pipeline(), Card(native_tokens=64, window=16, overlap=8))
    put, most = Memory.put, []

    def watched(self, *args):
        put(self, *args)
        most.append(self.tokens)

    monkeypatch.setattr(Memory, "put", watched)
    found = []
    for height in (128, 512):
        most.clear()
        call(rolled, height=height, width=8, draft=0, num_inference_steps=2)
        found.append(max(most))
    assert found[0] == found[1] < 128 * 8 // 4


@pytest.mark.parametrize("name", [*WITH_CONTROL, "Flux2KleinPipeline"])
@pytest.mark.parametrize("lag", [None, "autoregressive"])
def test_memory_that_was_replaced_is_gone_at_once(name, lag, monkeypatch):
    pipe, arguments = make(name)
    branches = 1 + (name in ("Flux2KleinPipeline", "FluxControlNetPipeline"))
    with counted(core_memory, monkeypatch) as sizes:
        draw(roll(pipe), arguments, window=16, overlap=8, draft=1, lag=lag)
    assert len(sizes) > 2 and max(sizes) <= branches + 1, "each branch's own, and the one that takes another's place"
