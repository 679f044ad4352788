"""On a canvas larger than the model's own, a prompt's words keep the share of attention that they were trained with."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from test_models_families import HEIGHT, PIPELINES, WIDTH, Setting
from tiny_families import apart, draw, make
from tiny_pipeline import call, pipeline

from rolling_diffusion import Block, Card, roll
from rolling_diffusion.core.memory import View
from rolling_diffusion.models.call import Levels, run

CARD = Card(size=32, steps=4, window=16, overlap=8)


def twice(request: dict[str, Any]) -> dict[str, Any]:
    """A request in which each word is said twice: each is then attended to twice as much."""
    names = {"encoder_hidden_states": 1, "txt_ids": 0}
    return {n: torch.cat([x, x], names[n]) if n in names else x for n, x in request.items()}


@pytest.mark.parametrize("name", PIPELINES)
@pytest.mark.parametrize("remembered, weight", [(0, 1.0), (24, 1.0), (24, 0.5)])
@torch.no_grad()
def test_beside_twice_as_many_tokens_words_weigh_as_if_said_twice(name, remembered, weight):
    it = Setting(name)
    seen = round(48 - remembered + remembered * weight)
    stored: dict[int, Any] = {}
    if remembered:
        it.rolling([0.3], tokens=torch.arange(remembered), keep=stored)
    blocks = [Block(0, 0, 0, HEIGHT // 2, WIDTH)]
    faded = None if weight == 1 else torch.full((remembered,), weight).log()
    view = View([stored[i] for i in range(len(stored))], faded, blocks) if remembered else None
    tokens, levels = torch.arange(remembered, 48), Levels.of(torch.tensor([0.6]) * it.scale, None)

    def answer(request: dict[str, Any], balanced: int | None) -> torch.Tensor:
        out = run(it.family, it.model, request, tokens, (HEIGHT, WIDTH), levels, view, balanced=balanced)[0]
        return it.flat(out)[:, : len(tokens)]

    plain, louder = answer(it.request, None), answer(it.request, seen // 2)
    assert apart(louder, answer(twice(it.request), None)) < 1e-4 < apart(plain, louder)
    assert torch.equal(answer(it.request, seen), plain), "as many are seen as it was trained beside"


def test_draft_memory_and_blocks_hear_the_words_alike():
    """Drawn block by block, each call sees the whole canvas: all of it is as if each word were said twice."""
    pipe, said = make("FluxPipeline")
    tokens = said["height"] * said["width"] // 4
    rolled, way = roll(pipe, replace(CARD, balanced_tokens=tokens // 2)), {"lag": "autoregressive", "draft": 2}
    louder, plain = draw(rolled, said, **way), draw(roll(pipe, CARD), said, **way)
    doubled = said | {"prompt_embeds": said["prompt_embeds"].repeat(1, 2, 1)}
    assert apart(louder, draw(roll(pipe, CARD), doubled, **way)) < 1e-4 < apart(louder, plain)
    assert torch.equal(draw(roll(pipe, replace(CARD, balanced_tokens=tokens)), said, **way), plain)


def test_an_ordinary_call_is_the_pipeline_s_all_the_same():
    pipe, arguments = make("FluxPipeline")
    rolled = roll(pipe, replace(CARD, balanced_tokens=8))
    assert torch.equal(draw(rolled, arguments, lag=0), draw(pipe, arguments))
    assert torch.equal(draw(rolled, arguments, window=max(arguments["height"], 32)), draw(pipe, arguments))


def test_one_block_beside_what_is_given_hears_the_words():
    pipe, arguments = make("FluxPipeline")
    own = roll(pipe).family.cells(draw(pipe, arguments), 32, 24)
    mask = torch.zeros(32, 24, dtype=torch.bool)
    mask[:16] = True
    plain, loud = (
        draw(roll(pipe, replace(CARD, balanced_tokens=b)), arguments, seed=2, given=own, given_mask=mask, window=64)
        for b in (None, 24)
    )
    assert apart(plain, loud) > 1e-3 and torch.equal(plain[:, :96], loud[:, :96])


def test_a_guide_hears_the_words_too():
    pipe, arguments = make("FluxPipeline")
    card, asked, answered = replace(CARD, native_tokens=48, window=None), [], []
    ends = [
        pipe.transformer.x_embedder.register_forward_pre_hook(lambda _, given: asked.append(given[0].clone())),
        pipe.transformer.proj_out.register_forward_hook(lambda _, given, out: answered.append(out.clone())),
    ]
    first = []  # of what the guide, which comes first, is asked and answers
    try:
        for balanced in (None, 24):
            asked.clear(), answered.clear()
            assert draw(roll(pipe, replace(card, balanced_tokens=balanced)), arguments).isfinite().all()
            first.append((asked[0], answered[0]))
    finally:
        for end in ends:
            end.remove()
    (silent, quiet), (loud, clear) = first
    assert silent.shape[1] == 48 and torch.equal(silent, loud)
    assert apart(quiet, clear) > 1e-3


def test_prompts_with_places_are_heard_in_their_parts():
    card, places = Card(window=8, overlap=4), [(0, "a red ball"), (0.5, "a blue boat")]
    plain, loud = (call(roll(pipeline(), replace(card, balanced_tokens=b)), prompt=places, draft=1) for b in (None, 8))
    assert apart(plain, loud) > 1e-3 and loud.isfinite().all()


@pytest.mark.parametrize("value", [0, -1, True, 1.5, "many"])
def test_a_card_of_another_number_is_one_sentence(value):
    with pytest.raises(ValueError, match=r"balanced_tokens = .* and must say a whole number above 0, or null"):
        Card(balanced_tokens=value)


def test_the_embedded_model_was_trained_beside_a_picture_and_half_of_one(rolled):
    assert rolled.card.balanced_tokens == 1.5 * (rolled.card.size // 16) ** 2
