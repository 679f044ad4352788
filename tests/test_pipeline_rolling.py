"""Rolling runs: schedulers by name, callbacks, interrupts, memory, and the arguments beyond FluxPipeline's."""

import gc
import weakref

import pytest
import torch
from PIL import Image
from tiny_pipeline import ROLL, call, parts, pipelines

from rolling_diffusion.core.memory import Memory
from rolling_diffusion.core.order import make_order
from rolling_diffusion.pipeline import SAMPLERS, SPACINGS, RollingFluxPipeline
from rolling_diffusion.pipeline.schedulers import call_levels, choose, prepare


@pytest.fixture(scope="module")
def pipe():
    return pipelines(True)[1]


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("sampler", SAMPLERS)
@torch.no_grad()
def test_named_samplers_step_like_the_plain_loop(pipe, sampler, spacing):
    """The scheduler that a name stands for, stepped over the whole canvas by FluxPipeline's own loop."""
    torch.manual_seed(3)
    ours = call(pipe, sampler=sampler, scheduler_sigmas=spacing, lag=0)

    scheduler, levels = choose(pipe.scheduler, sampler, spacing)
    scheduler, _ = prepare(scheduler, levels, 4, None, 48, torch.device("cpu"))
    embeds, pooled, ids = pipe.encode_prompt("a red ball", max_sequence_length=8)
    x, positions = pipe.prepare_latents(
        1, 4, 16, 12, torch.float32, torch.device("cpu"), torch.Generator().manual_seed(1)
    )
    torch.manual_seed(3)
    for t in scheduler.timesteps:
        velocity = pipe.transformer(
            hidden_states=x,
            timestep=t.expand(1).to(x.dtype) / 1000,
            guidance=torch.full([1], 3.5),
            pooled_projections=pooled,
            encoder_hidden_states=embeds,
            txt_ids=ids,
            img_ids=positions,
        ).sample
        x = scheduler.step(velocity, t, x, return_dict=False)[0]
    assert torch.equal(ours, x)
    rolled = call(pipe, sampler=sampler, scheduler_sigmas=spacing, **ROLL)
    assert rolled.isfinite().all()
    assert not torch.equal(rolled, ours)


def test_spacings_and_samplers_share_their_levels(pipe):
    found = {}
    for spacing in SPACINGS:
        for sampler in SAMPLERS:
            scheduler, levels = choose(pipe.scheduler, sampler, spacing)
            scheduler, steps = prepare(scheduler, levels, 5, None, 48, torch.device("cpu"))
            assert steps == 5
            each = torch.stack(call_levels(scheduler))
            each = each[torch.cat([torch.tensor([0]), torch.arange(1, len(each), scheduler.order)])]
            torch.testing.assert_close(each, found.setdefault(spacing, each))
    assert len({tuple(levels.tolist()) for levels in found.values()}) == len(SPACINGS)


def test_names_are_checked(pipe):
    with pytest.raises(ValueError, match="unknown sampler 'eulr': choose one of euler, heun"):
        call(pipe, sampler="eulr")
    with pytest.raises(ValueError, match="unknown spacing of the sigmas 'linear': choose one of simple"):
        call(pipe, scheduler_sigmas="linear")
    assert torch.equal(call(pipe, sampler="unipc", scheduler_sigmas="normal"), call(pipe, sampler="uni_pc"))


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"window": 7}, "window is 7 cells"),
        ({"overlap": 64}, "overlap is 64 cells"),
        ({"order": "up"}, "unknown order 'up'"),
        ({"num_inference_steps": -1}, "num_inference_steps is -1"),
        ({"draft": 4}, "draft is 4 steps"),
        ({"attention_persistence": 2}, "persistence is 2"),
        ({"cfg": 3, "true_cfg_scale": 2}, "not both"),
        ({"cfg": -1}, "cfg is -1"),
        ({"text_level": "least"}, "text_level is 'least'"),
        ({"height": 1}, "height is 0"),
    ],
)
def test_errors_are_one_sentence(pipe, wrong, sentence):
    with pytest.raises(ValueError, match=sentence) as caught:
        call(pipe, **wrong)
    assert "\n" not in str(caught.value)


def test_the_same_seed_gives_the_same_picture_whatever_else_is_drawn(pipe):
    def draw(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return call(pipe, **ROLL, order="random", generator=torch.Generator().manual_seed(4))

    assert torch.equal(draw(1), draw(2))


def test_ticks_progress_and_frames(pipe):
    """Every tick is one callback, one frame and one unit of progress; the frames hold x0 of the whole canvas."""
    told, frames = [], []

    def on_step(pipe, tick, timestep, tensors):
        told.append((tick, float(timestep), tensors["latents"].shape))
        return {}

    final = call(pipe, **ROLL, callback_on_step_end=on_step, on_frame=frames.append)
    assert [tick for tick, *_ in told] == list(range(pipe.num_timesteps)) == [f.tick for f in frames]
    assert pipe.num_timesteps == 10  # 4 steps and 3 more blocks, each 2 ticks later
    assert frames[-1].total == 10
    assert all(shape == (1, 48, 16) for *_, shape in told)
    assert told[0][1] == pytest.approx(1000)
    assert frames[-1].estimates[0].shape == (1, 4, 4, 12)
    # At the last step x0 is the result, since the next level is 0.
    assert torch.allclose(frames[-1].estimates[0], RollingFluxPipeline._unpack_latents(final, 16, 12, 1)[:, :, 12:])
    assert isinstance(pipe.preview(RollingFluxPipeline._unpack_latents(final, 16, 12, 1)), Image.Image)


@pytest.mark.parametrize("rolling", [{"lag": 0}, ROLL], ids=["lag 0", "rolling"])
def test_callbacks_change_latents_and_embeddings(rolling):
    stock, roll = pipelines()

    def quieten(pipe, i, t, tensors):
        latents = tensors["latents"] if i < pipe.num_timesteps - 1 else torch.zeros_like(tensors["latents"])
        return {"latents": latents, "prompt_embeds": 0.5 * tensors["prompt_embeds"]}

    more = {"callback_on_step_end": quieten, "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"]}
    assert call(roll, **rolling, **more).abs().sum() == 0, "the last callback's latents are the result"

    def half(pipe, i, t, tensors):
        return {"latents": 0.9 * tensors["latents"], "prompt_embeds": 0.5 * tensors["prompt_embeds"]}

    more["callback_on_step_end"] = half
    changed = call(roll, **rolling, **more)
    assert not torch.equal(changed, call(roll, **rolling))
    if rolling == {"lag": 0}:
        assert torch.equal(changed, call(stock, **more))
    with pytest.raises(ValueError, match="callback_on_step_end_tensor_inputs"):
        call(roll, callback_on_step_end=half, callback_on_step_end_tensor_inputs=["pixels"])


@pytest.mark.parametrize("rolling", [{"lag": 0, "window": 8, "overlap": 4}, ROLL], ids=["lag 0", "rolling"])
def test_interrupt(rolling):
    """Ends after the tick in which it was asked for, with the canvas as it stands: at lag 0 as FluxPipeline has it."""
    stock, roll = pipelines()
    ticks = []

    def stop(pipe, i, t, tensors):
        ticks.append(i)
        pipe._interrupt = i == 1
        return {}

    stopped = call(roll, **rolling, callback_on_step_end=stop)
    assert ticks == [0, 1]
    if rolling.get("lag") == 0:
        assert torch.equal(stopped, call(stock, callback_on_step_end=stop))
    else:
        noise = roll.prepare_latents(1, 4, 16, 12, torch.float32, torch.device("cpu"), torch.Generator().manual_seed(1))
        assert torch.equal(stopped[:, 12:], noise[0][:, 12:]), "blocks that wait are still noise"
        assert not torch.equal(stopped[:, :12], noise[0][:, :12])
    assert torch.equal(call(roll, **rolling), call(roll, **rolling)), "the next run is whole"


def test_an_exception_in_a_callback_ends_the_run(pipe):
    def fail(*_):
        raise KeyError("mine")

    before = call(pipe, **ROLL)
    for more in ({"callback_on_step_end": fail}, {"on_frame": fail}):
        with pytest.raises(KeyError, match="mine"):
            call(pipe, **ROLL, **more)
        assert torch.is_grad_enabled()
    assert torch.equal(call(pipe, **ROLL), before)


def test_memory_acts_has_a_cap_and_is_freed(pipe, monkeypatch):
    seen: list[weakref.ref] = []
    tokens: list[int] = []
    put = Memory.put

    def watched(self, kind, block, layer, key, value):
        put(self, kind, block, layer, key, value)
        seen.append(weakref.ref(self))
        tokens.append(self.tokens)

    full = call(pipe, **ROLL)
    assert not torch.equal(call(pipe, **ROLL, attention_persistence=0), full)
    assert not torch.equal(call(pipe, **ROLL, attention_persistence=0.5), full)
    assert not torch.equal(call(pipe, **ROLL, lookahead=0), full)
    assert torch.equal(call(pipe, **ROLL, memory_tokens=48), full), "a cap of the whole canvas changes nothing"
    assert torch.equal(call(pipe, **ROLL, memory_device="cpu"), full)
    assert not torch.equal(call(pipe, **ROLL, memory_tokens=12), full)
    monkeypatch.setattr(Memory, "put", watched)
    call(pipe, **ROLL, attention_persistence=0, lookahead=0)
    assert not seen, "no memory, no cost"
    call(pipe, **ROLL)
    assert max(tokens) <= 48
    gc.collect()
    assert seen
    assert all(ref() is None or ref().tokens == 0 for ref in seen)


def test_draft_lookahead_and_lag_of_heun(pipe):
    """A step of Heun is two calls, in the draft too; the last step is one."""
    frames = []
    call(pipe, window=8, overlap=4, sampler="heun", draft=1, lag="autoregressive", on_frame=frames.append)
    assert [len(f.blocks) for f in frames[:3]] == [4, 4, 1]
    assert len(frames) == 2 + 4 * 5


def test_default_draft_and_window_follow_the_card():
    made = parts()
    plain = RollingFluxPipeline(**made)
    trained = RollingFluxPipeline(**made, rolling={"draft": 0.0, "window": None, "steps": 8, "size": 16})
    assert (plain.card.draft_steps(20), trained.card.draft_steps(20)) == (10, 0)
    frames = []
    trained.set_progress_bar_config(disable=True)
    images = call(trained, height=None, width=None, num_inference_steps=None, on_frame=frames.append)
    assert images.shape == (1, 64, 16)  # 16 × 16 pixels
    assert frames[0].total == 8 + 3 * 4  # 4 strips, lag 4 of 8 steps
    with pytest.raises(ValueError, match="the model's card knows no 'tained'"):
        RollingFluxPipeline(**made, rolling={"tained": True})
    with pytest.raises(ValueError, match="the model's card says draft = 2"):
        RollingFluxPipeline(**made, rolling={"draft": 2})


@pytest.mark.parametrize("order", ["left-to-right", "raster", "spiral-out"])
def test_orders(pipe, order):
    frames = []
    images = call(pipe, **ROLL, order=order, on_frame=frames.append, output_type="pil", height=16, width=16)
    assert images[0].size == (16, 16)
    assert frames[0].blocks == (make_order(order, 16, 16, 4)[0],)


def test_out_of_memory_is_one_sentence_and_frees(pipe, monkeypatch):
    from rolling_diffusion.pipeline import run, space

    def short(*_, **__):
        raise space.OutOfMemory("CUDA out of memory.")

    monkeypatch.setattr(run.Branch, "__call__", short)
    with pytest.raises(space.OutOfMemory, match="a smaller window") as caught:
        call(pipe, **ROLL)
    assert "\n" not in str(caught.value)
    assert caught.value.__context__ is None and caught.value.__cause__ is None, "nothing holds what the run held"
