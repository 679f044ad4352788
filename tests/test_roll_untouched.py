"""The pipeline is left as it was, however a rolling call ends."""

import json

import pytest
import torch
from diffusers import AutoPipelineForImage2Image, FluxImg2ImgPipeline, StableDiffusion3Img2ImgPipeline
from tiny_families import MAKERS, draw, make

from rolling_diffusion import roll

ROLL = {"window": 16, "overlap": 8, "draft": 1, "num_inference_steps": 3}
ENDINGS = "FluxControlNetPipeline", "StableDiffusion3InpaintPipeline"


def held(value):
    """What a value is, so that a change of it, or of anything in it, is seen."""
    if isinstance(value, torch.Tensor):
        return id(value), value.dtype, value.device, value._version
    if isinstance(value, dict):
        return [(key, held(entry)) for key, entry in value.items()]
    if isinstance(value, (list, tuple)):
        return [held(entry) for entry in value]
    return value if isinstance(value, (int, float, str, bool, type(None))) else (type(value), id(value))


def state(pipe):
    """All that a pipeline is: its class, attributes and scheduler, and those of every module; and torch's own state."""
    found = {"pipe": (type(pipe), held(vars(pipe))), "scheduler": held(vars(pipe.scheduler))}
    for name, model in pipe.components.items():
        if isinstance(model, torch.nn.Module):
            for path, module in model.named_modules():
                found[f"{name}.{path}"] = type(module), held(vars(module))
    found["random"] = torch.get_rng_state().tolist()
    found["torch"] = torch.is_grad_enabled(), torch.get_default_dtype()
    return found


def changes(before, pipe):
    after = state(pipe)
    return [name for name in {*before, *after} if before.get(name) != after.get(name)]


@pytest.mark.parametrize("name", MAKERS)
def test_nothing_of_a_pipeline_changes_and_its_own_call_gives_what_it_gave(name):
    pipe, arguments = make(name)
    expected = draw(pipe, arguments)
    pipe, arguments = make(name)
    before = state(pipe)
    for options in (ROLL, {"lag": 0}, ROLL | {"sampler": "lcm", "context_noise": 0.1, "order": "random"}):
        draw(roll(pipe), arguments, **options)
        assert not changes(before, pipe), options
    assert torch.equal(draw(pipe, arguments), expected)


class Stop(Exception):
    pass


@pytest.fixture(params=ENDINGS)
def begun(request):
    """A pipeline, its state, its arguments, and how many ticks a rolling call takes."""
    pipe, arguments = make(request.param)
    before, ticks = state(pipe), []
    draw(roll(pipe), arguments, **ROLL, on_tick=ticks.append)
    assert len(ticks) == ticks[0].total > 4
    yield pipe, before, arguments, len(ticks)
    assert not changes(before, pipe)
    rolled = draw(roll(pipe), arguments, **ROLL)
    fresh, _ = make(request.param)
    assert torch.equal(rolled, draw(roll(fresh), arguments, **ROLL))
    assert torch.equal(draw(pipe, arguments), draw(fresh, arguments))


def test_an_error_in_a_callback_at_any_tick_changes_nothing(begun):
    pipe, before, arguments, ticks = begun
    for k in range(ticks):

        def stop(tick, k=k):
            if tick.number == k:
                raise Stop

        def give_up(stand_in, tick, timestep, values, k=k):
            if tick == k:
                raise KeyboardInterrupt
            return values

        for error, options in ((Stop, {"on_tick": stop}), (KeyboardInterrupt, {"callback_on_step_end": give_up})):
            with pytest.raises(error):
                draw(roll(pipe), arguments, **ROLL, **options)
            assert not changes(before, pipe), k


def test_an_interrupt_at_any_tick_ends_the_call_and_changes_nothing(begun):
    pipe, before, arguments, ticks = begun
    for k in range(ticks):
        seen = []

        def interrupt(stand_in, tick, timestep, values, k=k, seen=seen):
            seen.append(tick)
            if tick == k:
                (pipe if k % 2 else stand_in)._interrupt = True  # the user's own, or the one that is called
            return values

        draw(roll(pipe), arguments, **ROLL, callback_on_step_end=interrupt)
        assert seen == list(range(k + 1))
        assert not changes(before, pipe), k


def test_an_error_in_any_call_of_the_transformer_or_in_the_vae_changes_nothing(begun):
    pipe, before, arguments, ticks = begun
    for model, calls in ((pipe.transformer.proj_out, range(ticks)), (pipe.vae.decoder, [0])):
        for k in calls:
            left = iter(range(k, -1, -1))

            def fail(*_, left=left):
                if next(left) == 0:
                    raise Stop

            handle = model.register_forward_pre_hook(fail)
            with pytest.raises(Stop):
                draw(roll(pipe), arguments, **ROLL, output_type="pt")
            handle.remove()
            assert not changes(before, pipe), k


@pytest.mark.parametrize(
    ("name", "kind"),
    [("FluxPipeline", FluxImg2ImgPipeline), ("StableDiffusion3Pipeline", StableDiffusion3Img2ImgPipeline)],
)
def test_pipelines_made_from_it_and_folders_saved_never_know(name, kind, tmp_path):
    pipe, arguments = make(name)
    pipe.save_pretrained(tmp_path / "before")
    draw(roll(pipe), arguments, **ROLL)
    pipe.save_pretrained(tmp_path / "after")
    for saved in (tmp_path / "before").rglob("*.*"):
        again = tmp_path / "after" / saved.relative_to(tmp_path / "before")
        assert saved.read_bytes() == again.read_bytes(), saved.name
    assert json.loads((tmp_path / "after" / "model_index.json").read_text())["_class_name"] == name
    for made in (kind.from_pipe(pipe), AutoPipelineForImage2Image.from_pipe(pipe)):
        assert type(made) is kind and made.transformer is pipe.transformer
        assert made.transformer.dtype == torch.float32


def test_a_pipeline_in_bfloat16_stays_in_bfloat16():
    pipe, arguments = make("FluxPipeline")
    pipe.to(torch.bfloat16)
    arguments = {k: v.bfloat16() if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    before = state(pipe)
    assert draw(roll(pipe), arguments, **ROLL).dtype == torch.bfloat16
    assert not changes(before, pipe) and pipe.dtype == torch.bfloat16


def test_hooks_of_offloading_stay_and_are_the_ones_that_diffusers_sets():
    """maybe_free_model_hooks, which ends each call of a pipeline, is the user's own pipeline's."""
    pipe, arguments = make("FluxPipeline")
    pipe.enable_group_offload(
        onload_device=torch.device("cpu"), offload_device=torch.device("cpu"), offload_type="leaf_level"
    )
    before, freed = state(pipe), []
    type(pipe).maybe_free_model_hooks, stock = lambda self: freed.append(self), type(pipe).maybe_free_model_hooks
    try:
        draw(roll(pipe), arguments, **ROLL)
    finally:
        type(pipe).maybe_free_model_hooks = stock
    assert freed == [pipe] and not changes(before, pipe)
