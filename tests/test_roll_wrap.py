"""Circles: canvases whose edges meet."""

from typing import Any

import pytest
import torch
from diffusers import AutoencoderTiny
from diffusers.models.embeddings import apply_rotary_emb
from tiny_families import apart, draw, make, normal

from benchmarks.canvas import borders_of
from rolling_diffusion import load, roll
from rolling_diffusion.models.registry import family_of
from rolling_diffusion.pipeline.decoding import CircleDecoder

FLUXES = ["FluxPipeline", "Flux2Pipeline"]
ROLL = {"window": 16, "overlap": 8, "draft": 1}


@pytest.mark.parametrize("name", FLUXES)
def test_turned_keys_are_those_of_their_new_places(name):
    model = make(name)[0].transformer
    key, places = normal(1, 6, 2, 16), torch.tensor([[0, 0], [3, 1], [5, 7], [9, 2], [4, 40], [1, 1]])
    by = torch.tensor([[1, 2], [-3, 0], [0, -7], [20, 5], [-4, -40], [0, 0]])

    def at(places: torch.Tensor) -> torch.Tensor:
        ids = torch.zeros(6, len(model.config.axes_dims_rope))
        ids[:, 1:3] = places
        turned: torch.Tensor = apply_rotary_emb(key, model.pos_embed(ids), sequence_dim=1)  # type: ignore
        return turned

    assert apart(family_of(model).turned(model, at(places), by), at(places + by)) < 1e-5


@pytest.mark.parametrize("name", FLUXES)
@pytest.mark.parametrize("way", [{"lag": 0}, ROLL, ROLL | {"order": "left-to-right", "draft": 0}], ids=str)
def test_a_circle_is_drawn_otherwise_and_nothing_else_is(name, way):
    pipe, arguments = make(name)
    rolled = roll(pipe)
    wrapped, plain = draw(rolled, arguments, wrap="xy", **way), draw(rolled, arguments, **way)
    assert wrapped.isfinite().all() and apart(wrapped, plain) > 1e-4
    assert torch.equal(wrapped, draw(rolled, arguments, wrap="yx", **way)), "drawn anew, the same"
    assert torch.equal(draw(pipe, arguments), draw(rolled, arguments, lag=0)), "and the pipeline is as it was"


def test_a_turned_canvas_is_drawn_turned(monkeypatch):
    """With the seam turned as far as the noise, every token sees all others as before: the picture is turned, too."""
    from rolling_diffusion.pipeline.run import Run

    pipe, arguments = make("FluxPipeline")
    rolled = roll(pipe)
    noise = rolled.family.latents(normal(1, 4, 32, 24))
    monkeypatch.setattr(Run, "seam", lambda run, axis, blocks: 3 if axis == "x" else 0)
    one = draw(rolled, arguments, wrap="x", latents=noise, lag=0)
    turned = rolled.family.latents(rolled.family.cells(noise, 32, 24).roll(8, 3))
    monkeypatch.setattr(Run, "seam", lambda run, axis, blocks: 7 if axis == "x" else 0)
    other = draw(rolled, arguments, wrap="x", latents=turned, lag=0)
    assert apart(rolled.family.cells(one, 32, 24).roll(8, 3), rolled.family.cells(other, 32, 24)) < 1e-4


def test_decoding_goes_on_beyond_the_edge():
    torch.manual_seed(0)
    vae = AutoencoderTiny(latent_channels=4, decoder_block_out_channels=(8,) * 4, encoder_block_out_channels=(8,) * 4)
    circle, z = CircleDecoder(vae.eval(), "xy"), normal(1, 4, 8, 12)
    with torch.no_grad():
        whole, turned = circle.decode(z).sample, circle.decode(z.roll((3, 5), (2, 3)), return_dict=False)[0]
    assert whole.shape == (1, 3, 64, 96) and circle.config is vae.config
    assert apart(whole.roll((24, 40), (2, 3)), turned) < 1e-5


def test_the_embedded_model_draws_without_a_seam():
    rolled = roll(load("rolling_diffusion/embedded", None, "cpu"))
    rolled.pipe.set_progress_bar_config(disable=True)
    prompts = ["on grass by day", "on sand in the evening", "in the snow at night"] * 2

    def seam(wrap: str | None) -> float:
        generators = [torch.Generator().manual_seed(100 + i) for i in range(len(prompts))]
        size: dict[str, Any] = {"width": 128, "height": 128, "num_inference_steps": 8}
        images = rolled(prompt=prompts, generator=generators, output_type="np", wrap=wrap, **size).images
        return float(borders_of(images)[0])

    assert seam("x") < 1.2
    assert seam(None) > 5


@pytest.mark.parametrize(
    ("name", "wrap", "sentence"),
    [("FluxPipeline", "z", "wrap is 'z', and must be"), ("StableDiffusion3Pipeline", "x", "cannot be a circle")],
)
def test_what_cannot_be_a_circle(name, wrap, sentence):
    pipe, arguments = make(name)
    with pytest.raises(ValueError, match=sentence):
        draw(roll(pipe), arguments, wrap=wrap)
