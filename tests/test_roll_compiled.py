"""Compiled transformers roll: the same pictures, and few compilations however many ticks and layers there are."""

import shutil

import pytest
import torch
import torch._dynamo
from diffusers import FluxTransformer2DModel
from tiny_families import draw, flux, make

from rolling_diffusion import roll

# On torch 2.5 dynamo traces neither diffusers' comparison of versions nor a max over unpacked sizes.
OLD = tuple(int(n) for n in torch.__version__.split(".")[:2]) < (2, 9)
pytestmark = pytest.mark.skipif(OLD, reason="compiled transformers do not roll on torch 2.5; tried from 2.9 on")
ROLL = {"window": 8, "overlap": 4, "draft": 1, "num_inference_steps": 6, "attention_persistence": 0.7}


@pytest.fixture(autouse=True)
def fresh():
    limit = torch._dynamo.config.cache_size_limit
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()
    torch._dynamo.config.cache_size_limit = limit


def compilations():
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def whole(pipe, **options):
    pipe.transformer = torch.compile(pipe.transformer, **options)


def in_place(pipe, **options):
    pipe.transformer.compile(**options)


def its_forward(pipe, **options):
    pipe.transformer.forward = torch.compile(pipe.transformer.forward, **options)


def blocks(pipe, **options):
    pipe.transformer.compile_repeated_blocks(**options)


WAYS = {
    "whole": ("FluxPipeline", whole, 10),
    "in place": ("StableDiffusion3Pipeline", in_place, 10),
    "its forward": ("FluxPipeline", its_forward, 10),
    "blocks": ("Flux2Pipeline", blocks, 20),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_compiled_transformer_draws_the_same_and_is_not_compiled_for_each_tick_or_layer(way):
    """The backend is eager: what is tested is that calls can be traced whole, not what a compiler makes of them."""
    name, compile_it, most = WAYS[way]
    pipe, arguments = make(name)
    if name == "FluxPipeline":  # tracing takes its time
        pipe.transformer = flux(num_layers=1, num_single_layers=1)[0].transformer
    stock, expected = draw(pipe, arguments), draw(roll(pipe), arguments, **ROLL)
    compile_it(pipe, backend="eager", fullgraph=True)
    assert torch.allclose(draw(pipe, arguments), stock, atol=1e-4)
    assert torch.allclose(draw(roll(pipe), arguments, **ROLL), expected, atol=1e-4)
    found = compilations()
    assert 2 < found <= most
    draw(roll(pipe), arguments, **ROLL | {"num_inference_steps": 9})  # more ticks: nothing is compiled
    assert torch.allclose(draw(pipe, arguments), stock, atol=1e-4)
    assert compilations() == found


@pytest.mark.skipif(shutil.which("cc") is None, reason="inductor needs a C compiler")
def test_blocks_compiled_by_inductor_draw_the_same():
    torch.manual_seed(0)
    pipe, arguments = make("FluxPipeline")
    pipe.transformer = flux(num_layers=1, num_single_layers=1)[0].transformer
    few = ROLL | {"window": 16, "overlap": 0, "lag": "autoregressive", "attention_persistence": 1.0}  # kinds of calls
    expected = draw(roll(pipe), arguments, **few)
    pipe.transformer.compile_repeated_blocks(backend="inductor", dynamic=True)
    assert isinstance(pipe.transformer, FluxTransformer2DModel)
    assert torch.allclose(draw(roll(pipe), arguments, **few), expected, atol=1e-4)
    assert compilations() > 2


def test_a_block_whose_forward_alone_was_compiled_is_refused():
    pipe, arguments = make("FluxPipeline")
    block = pipe.transformer.transformer_blocks[0]
    block.forward = torch.compile(block.forward, backend="eager")
    with pytest.raises(ValueError, match="the forward of FluxTransformerBlock was replaced by something that is not"):
        draw(roll(pipe), arguments, **ROLL)
