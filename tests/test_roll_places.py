"""Prompts with places: whose words which part of the canvas sees, and what is refused."""

import inspect
import math
from typing import Any

import pytest
import torch
from tiny_families import apart, draw, make, normal
from tiny_pipeline import call, pipeline

from rolling_diffusion import Card, roll
from rolling_diffusion.models.call import Levels
from rolling_diffusion.models.prompts import Prompts, spread
from rolling_diffusion.pipeline.places import Places

ROLL = {"window": 8, "overlap": 4, "draft": 1}
TWO = [(0, "a red ball"), (0.5, "a blue boat")]


@pytest.mark.parametrize("text_first", [True, False])
def test_the_bias_is_what_its_definition_says(text_first):
    """Against a dense reference, query by query and key by key."""
    weights = torch.tensor([[1.0, 0.25, 0.0], [0.0, 0.75, 1.0]])  # two prompts, three image tokens
    memory, faded = torch.tensor([[1.0, 0.5], [0.0, 0.5]]), torch.tensor([0.0, -2.0])
    bias = Prompts(weights, memory, None).bias(4, 1, text_first, faded)[0, 0]
    text: list[Any] = [("word", j, None) for j in (0, 0, 1, 1)]
    image: list[Any] = [("image", None, weights[:, i]) for i in range(3)] + [("reference", None, torch.ones(2))]
    own = text + image if text_first else image + text
    past: list[Any] = [("memory", None, memory[:, m], faded[m]) for m in range(2)]
    for q, query in enumerate(own):
        for k, key in enumerate([*own, *past]):
            expected: Any = key[3] if key[0] == "memory" else 0.0
            kinds = query[0] == "word", key[0] == "word"
            if kinds == (True, True):
                expected = 0.0 if query[1] == key[1] else -math.inf
            elif kinds == (True, False):
                expected = expected + math.log(w) if (w := float(key[2][query[1]])) else -math.inf
            elif kinds == (False, True):
                expected = math.log(w) if (w := float(query[2][key[1]])) else -math.inf
            assert float(bias[q, k]) == pytest.approx(float(expected)), (query, key)


def test_rows_of_modulation_are_of_each_level_and_prompt():
    prompts = Prompts(torch.eye(2)[:, [0, 0, 1, 1]], None, [torch.zeros(1, 3), torch.ones(1, 3)])
    levels = Levels.of_prompts(torch.tensor([[0.9, 0.4]]), torch.tensor([0, 1, 1, 1]), "max", prompts, 6)
    assert levels.words is not None and levels.index is not None and levels.pooled is not None
    assert levels.words.tolist() == [0, 0, 0, 1, 1, 1]
    assert levels.timesteps[0, levels.words].tolist() == pytest.approx([0.9] * 6), "text takes the highest"
    assert levels.timesteps[0, levels.index].tolist() == pytest.approx([0.9, 0.4, 0.4, 0.4])
    assert levels.pooled[0, levels.index, 0].tolist() == [0, 0, 1, 1]
    assert levels.pooled[0, levels.words, 0].tolist() == [0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize("rolling", [ROLL, {"lag": 0}, ROLL | {"draft": 0, "order": "left-to-right"}])
def test_one_prompt_for_all_is_no_list_bit_for_bit(rolling):
    rolled = roll(pipeline())
    assert torch.equal(call(rolled, **rolling), call(rolled, **rolling, prompt=[(0, "a red ball")]))


@pytest.mark.parametrize("guided", [False, True])
def test_where_image_tokens_do_not_meet_a_part_hangs_on_its_own_prompt_alone(guided):
    """Blocks that see no other block, one after the other: the first part's picture is the same whatever the second
    part's prompt is, and the other way round."""
    pipe = pipeline(guided)
    rolled = roll(pipe)
    alone = {"lag": "autoregressive", "draft": 0, "lookahead": 0, "attention_persistence": 0.0, "prompt_blend": 0}
    alone |= {"window": 8, "overlap": 0}

    def drawn(first: str, second: str) -> torch.Tensor:
        found = call(rolled, prompt=[(0, first), (0.5, second)], **alone)
        return rolled.family.cells(found, 16, 12)

    ball_boat, ball_tree, tree_boat = (
        drawn("a red ball", "a boat"),
        drawn("a red ball", "a tree"),
        drawn("tree", "a boat"),
    )
    assert torch.equal(ball_boat[..., :8, :], ball_tree[..., :8, :])
    assert torch.equal(ball_boat[..., 8:, :], tree_boat[..., 8:, :])
    assert apart(ball_boat[..., 8:, :], ball_tree[..., 8:, :]) > 1e-4
    assert apart(ball_boat[..., :8, :], tree_boat[..., :8, :]) > 1e-4
    one = rolled.family.cells(call(rolled, prompt="a red ball", **alone), 16, 12)
    assert apart(one[..., :8, :], ball_boat[..., :8, :]) < 1e-5, "as if it were the only one"


@pytest.mark.parametrize("name", ["FluxPipeline", "Flux2Pipeline", "Flux2KleinPipeline", "StableDiffusion3Pipeline"])
def test_each_family_draws_each_part_from_its_own_words(name, monkeypatch):
    """Text encoders are left out of these pipelines: words become embeddings here."""
    pipe, arguments = make(name)
    stock = type(pipe).encode_prompt
    arguments = {name: value for name, value in arguments.items() if not name.endswith("prompt_embeds")}

    def embed(word: str, *shape: int) -> torch.Tensor:
        return normal(*shape, seed=sum(map(ord, word)))

    def encode_prompt(self, prompt: Any = None, device=None, num_images_per_prompt=1, prompt_embeds=None, **options):
        if name == "FluxPipeline":
            return embed(prompt, 1, 7, 24), embed(prompt, 1, 20), torch.zeros(7, 3)
        if name.startswith("Flux2"):
            return stock(self, prompt, device, num_images_per_prompt, embed(prompt, 1, 7, 16))
        whole, pooled = (1, 7, 32), (1, 20)
        return embed(prompt, *whole), embed("", *whole), embed(prompt, *pooled), embed("", *pooled)

    monkeypatch.setattr(type(pipe), "encode_prompt", encode_prompt)
    if name == "FluxPipeline":
        encode_prompt.__signature__ = inspect.signature(stock)  # type: ignore
    rolled = roll(pipe)
    way = {"window": 16, "overlap": 0, "lag": "autoregressive", "draft": 0, "lookahead": 0, "prompt_blend": 0}
    way |= {"attention_persistence": 0.0}

    def cells(prompt: Any) -> torch.Tensor:
        draw(rolled, arguments, prompt=prompt, **way)
        return rolled.family.cells(rolled.latents, 32, 24)

    drawn = [cells([(0, a), (16, b)]) for a, b in (("ball", "boat"), ("ball", "tree"), ("tree", "boat"))]
    assert (
        apart(drawn[0][..., :16, :], drawn[1][..., :16, :]) == 0 < apart(drawn[0][..., 16:, :], drawn[1][..., 16:, :])
    )
    assert (
        apart(drawn[0][..., 16:, :], drawn[2][..., 16:, :]) == 0 < apart(drawn[0][..., :16, :], drawn[2][..., :16, :])
    )
    alone = cells("ball")
    assert apart(alone[..., :16, :], drawn[0][..., :16, :]) < 1e-5


def test_weights_change_softly_and_sum_to_one():
    hard = Places([(0, "a"), (0.5, "b")], "left-to-right", 0, 8, 2).maps(4, 32)
    assert hard[0, :, :8].all() and not hard[0, :, 8:].any() and torch.equal(hard.sum(0), torch.ones(2, 16))
    soft = spread(hard, 4)
    assert torch.allclose(soft.sum(0), torch.ones(2, 16))
    row = soft[1, 0]
    assert (row[1:] >= row[:-1]).all() and row[0] == 0 and row[-1] == 1 and 0 < row[7] < row[8] < 1
    boxed = Places([(0, "a"), ((16, 0, 48, 32), "b")], "spiral-out", 0, 8, 2).maps(8, 8)
    assert boxed[1].nonzero().tolist() == [[y, x] for y in (0, 1) for x in (1, 2)]


def test_a_part_thinner_than_the_change_is_drawn():
    """Nowhere does its prompt weigh most."""
    rolled = roll(pipeline())
    drawn = call(rolled, prompt=[(0, "a red ball"), ((4, 4, 6, 6), "a boat")], **ROLL)
    assert drawn.isfinite().all() and apart(drawn, call(rolled, **ROLL)) > 1e-6


def test_with_a_guide_the_small_picture_has_the_same_places():
    places = Places([(0, "a"), (64, "b"), ((0, 0, 64, 32), "c")], "left-to-right", 0, 8, 2)
    assert places.on((4, 8), (8, 16)) == [(0.0, "a"), (0.5, "b"), ((0, 0, 32, 16), "c")]
    rolled = roll(pipeline(), Card(size=16, steps=4, window=8, overlap=4, native_tokens=12))
    ticks = []
    guided = call(rolled, prompt=TWO, on_tick=ticks.append)
    assert ticks[0].number == 2 and guided.isfinite().all()
    assert apart(guided, call(rolled, prompt="a red ball")) > 1e-4


@pytest.mark.parametrize(
    ("prompt", "sentence"),
    [
        ([(0, "a"), (0.0, "b")], "must lie beyond that of the prompt before it"),
        ([(0.5, "a"), (0.7, "b")], "leave a part of the canvas without one"),
        ([(0, "a"), (99, "b")], "the place of 'b' is 99, and must be a share"),
        ([(0, "a"), (1.5, "b")], "the place of 'b' is 1.5, and must be a share"),
        ([(0, "a"), ((0, 0, 99, 8), "b")], "must be pixels"),
        ([(0, "a"), ((0, 0, 12, 16), "b")], "no part of the canvas is left to 'a'"),
        ([(0, "a"), (0.5, 7)], "a prompt with a place is 7, and must be words"),
    ],
)
def test_places_that_cannot_be(prompt, sentence):
    with pytest.raises(ValueError, match=sentence):
        call(roll(pipeline()), prompt=prompt, **ROLL)


def test_what_is_said_for_one_prompt_is_refused_with_several():
    with pytest.raises(ValueError, match="prompt_2 is of one prompt"):
        call(roll(pipeline()), prompt=TWO, prompt_2="a boat", **ROLL)
