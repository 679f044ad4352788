"""On a GPU: what the CPU's tests say of every family, of streams, circles, guides and training, holds there too."""

import gc
import io
from contextlib import redirect_stdout

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from tiny_families import CPU, MAKERS, ROLL, TEXT_TO_IMAGE, WITH_CONTROL, apart, draw, make, picture

from rolling_diffusion import Card, roll

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
SMALL = Card(size=32, steps=4, window=16, overlap=8, native_tokens=48)  # of 192 on a canvas of 32 × 24


@pytest.fixture(autouse=True)
def exact():
    """Float32 is float32, as on the CPU."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def on_gpu(name, dtype=torch.float32):
    """A pipeline on the GPU, and its arguments."""
    pipe, arguments = make(name)
    given = {
        name: value.to("cuda", dtype) if isinstance(value, torch.Tensor) else value for name, value in arguments.items()
    }
    return pipe.to("cuda", dtype), given


@pytest.mark.parametrize("name", MAKERS)
def test_every_family_draws_what_it_draws_on_the_cpu(name):
    pipe, arguments = make(name)
    way = ROLL | {"attention_persistence": 0.7}
    expected = draw(roll(pipe), arguments, **way)
    pipe, arguments = on_gpu(name)
    stock = draw(pipe, arguments)
    assert apart(draw(roll(pipe), arguments, **way).cpu(), expected) < 2e-2 * float(expected.abs().max())
    assert torch.equal(draw(roll(pipe), arguments, lag=0), stock)
    assert torch.equal(draw(roll(pipe), arguments, window=64), stock)
    assert torch.equal(draw(pipe, arguments), stock)


@pytest.mark.parametrize("name", TEXT_TO_IMAGE)
def test_halves_memory_elsewhere_and_samplers(name):
    pipe, arguments = on_gpu(name, torch.bfloat16)
    rolled = roll(pipe)
    here = draw(rolled, arguments, **ROLL)
    assert here.dtype == torch.bfloat16 and here.isfinite().all()
    assert torch.equal(draw(rolled, arguments, **ROLL, memory_device="cpu"), here)
    for sampler in ("heun", "dpmpp_2m", "dpmpp_2m_sde"):
        assert draw(rolled, arguments, **ROLL, sampler=sampler).isfinite().all()


@pytest.mark.parametrize("name", WITH_CONTROL)
@pytest.mark.parametrize("way", ["enable_model_cpu_offload", "enable_sequential_cpu_offload"])
def test_offloaded_pipelines_draw_the_same(name, way):
    pipe, arguments = on_gpu(name)
    expected, stock = draw(roll(pipe), arguments, **ROLL), draw(pipe, arguments)
    pipe.to("cpu")
    getattr(pipe, way)()
    assert apart(draw(roll(pipe), arguments, **ROLL), expected) < 1e-4
    assert torch.equal(draw(roll(pipe), arguments, lag=0), draw(pipe, arguments))
    assert apart(draw(pipe, arguments), stock) < 1e-4


def test_groups_offloaded_in_a_stream_draw_the_same():
    pipe, arguments = on_gpu("FluxPipeline")
    expected = draw(roll(pipe), arguments, **ROLL)
    pipe.to("cpu").enable_group_offload(torch.device("cuda"), CPU, offload_type="leaf_level", use_stream=True)
    assert apart(draw(roll(pipe), arguments, **ROLL), expected) < 1e-4


@pytest.mark.parametrize("name", TEXT_TO_IMAGE)
def test_guides_circles_and_what_is_given(name):
    pipe, arguments = on_gpu(name)
    rolled, small = roll(pipe), roll(pipe, SMALL)
    assert apart(draw(small, arguments), draw(small, arguments, guide=False)) > 0.1
    assert draw(small, arguments, guide=picture()).isfinite().all()
    if rolled.family.turns:
        assert apart(draw(rolled, arguments, **ROLL, wrap="xy"), draw(rolled, arguments, **ROLL)) > 1e-3
    height, width = arguments["height"], arguments["width"]
    own = rolled.family.cells(draw(rolled, arguments, **ROLL), height, width)
    mask = torch.zeros(height, width, dtype=torch.bool)
    mask[:20] = True
    out = rolled.family.cells(draw(rolled, arguments, seed=2, given=own, given_mask=mask, **ROLL), height, width)
    assert torch.equal(out[..., :20, :], own[..., :20, :]) and apart(out[..., 20:, :], own[..., 20:, :]) > 0.1
    late = draw(rolled, arguments, **ROLL | {"order": "difficulty", "draft": 2, "extrapolation": 0.4})
    assert late.isfinite().all()


def test_nothing_is_left_on_the_gpu_and_its_random_state_is_the_user_s():
    pipe, arguments = on_gpu("FluxPipeline")
    rolled = roll(pipe)
    draw(rolled, arguments, **ROLL)
    rolled.latents = None
    gc.collect()
    before, state = torch.cuda.memory_allocated(), torch.cuda.get_rng_state()
    for sampler in ("euler", "dpmpp_2m_sde"):
        draw(rolled, arguments, **ROLL, sampler=sampler)
    rolled.latents = None
    gc.collect()
    assert torch.cuda.memory_allocated() == before
    assert torch.equal(torch.cuda.get_rng_state(), state)


def test_compiled_blocks_draw_the_same():
    pipe, arguments = on_gpu("FluxPipeline")
    expected = draw(roll(pipe), arguments, **ROLL)
    pipe.transformer.compile_repeated_blocks(dynamic=True)
    assert apart(draw(roll(pipe), arguments, **ROLL), expected) < 1e-2 * float(expected.abs().max())


@pytest.mark.parametrize("bits", ["Int8WeightOnlyConfig", "Float8WeightOnlyConfig"])
def test_models_quantised_by_torchao_roll(bits):
    quantization = pytest.importorskip("torchao.quantization")
    pipe, arguments = on_gpu("FluxPipeline", torch.bfloat16)
    expected = draw(roll(pipe), arguments, **ROLL).float()
    quantization.quantize_(pipe.transformer, getattr(quantization, bits)())
    found = draw(roll(pipe), arguments, **ROLL).float()
    assert 0 < (found - expected).norm() / expected.norm() < 0.2


def test_models_quantised_by_bitsandbytes_roll(tmp_path):
    pytest.importorskip("bitsandbytes")
    pipe, arguments = on_gpu("FluxPipeline")
    expected = draw(roll(pipe), arguments, **ROLL)
    pipe.transformer.save_pretrained(tmp_path)
    config = diffusers.BitsAndBytesConfig(load_in_8bit=True)
    pipe.transformer = type(pipe.transformer).from_pretrained(tmp_path, quantization_config=config)
    assert 0 < (draw(roll(pipe), arguments, **ROLL) - expected).norm() / expected.norm() < 0.1


# The embedded model.


@pytest.fixture(scope="module")
def embedded():
    from rolling_diffusion import load
    from rolling_diffusion.cli.model import EMBEDDED_FOLDER

    pipe = load(EMBEDDED_FOLDER, device="cuda", dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return roll(pipe)


def test_the_embedded_model_draws_what_it_draws_on_the_cpu(embedded, rolled):
    def drawn(pipe):
        said = {"output_type": "np", "generator": torch.Generator().manual_seed(3)}
        return pipe("a green tree and a red house on snow", **said).images[0]

    apart = np.abs(drawn(embedded) - drawn(rolled))
    assert apart.mean() < 0.01


def test_streams_and_prompts_along_a_canvas(embedded):
    said = {"stretch": 128, "num_inference_steps": 6, "seed": 1, "height": 128}
    strips = list(embedded.stream(["a red ball", "a blue boat", "a green tree"], **said))
    assert sum(strip.pixels.shape[1] for strip in strips) == 3 * 128
    places = [(0, "a red ball"), (0.5, "a blue boat")]
    size = {"width": 256, "height": 128, "num_inference_steps": 6, "order": "left-to-right"}
    drawn = embedded(prompt=places, generator=torch.Generator().manual_seed(1), **size).images[0]
    assert drawn.size == (256, 128)


def test_the_command_line_draws_evaluates_and_trains_there(tmp_path):
    from rolling_diffusion.cli import main

    def call(*arguments):
        with redirect_stdout(io.StringIO()) as out:
            assert main([*map(str, arguments)]) == 0
        return out.getvalue()

    call("generate", "a red ball", "--device", "cuda", "--steps", 4, "-o", tmp_path / "ball.png")
    assert Image.open(tmp_path / "ball.png").size == (256, 256)
    said = ["evaluate", "--prompts", 6, "--batch", 6, "--steps", 4, "--device", "cuda", "--dtype", "bfloat16"]
    assert "autoregressive" in call(*said)
    said = ["train", "--uniform-minutes", 0.1, "--rolling-minutes", 0.2, "--decoder-steps", 2, "--text-steps", 2]
    said += ["--batch", 2, "--workers", 2, "--device", "cuda", "-o", tmp_path / "model", "--work", tmp_path / "work"]
    call(*said)
    assert len(list((tmp_path / "work" / "samples").glob("*.png"))) == 2
    call("generate", "a red ball", "--model", tmp_path / "model", "--steps", 2, "-o", tmp_path / "new.png")
