"""What cfg means: for a distilled model, for a plain one, with and without a negative prompt."""

import pytest
import torch
from tiny_pipeline import ROLL, call, pipelines

from rolling_diffusion.core.order import Block
from rolling_diffusion.core.rollout import Moving
from rolling_diffusion.pipeline import Card
from rolling_diffusion.pipeline.guidance import BOUND, Guidance, decide, project

LAG_0 = {"lag": 0, "window": 4, "overlap": 2}


def test_distilled_without_a_negative_prompt_takes_cfg_as_its_own_guidance():
    stock, roll = pipelines(guidance=True)
    for empty in ({}, {"negative_prompt": ""}, {"negative_prompt": " "}):
        assert torch.equal(call(roll, cfg=7.0, **empty, **LAG_0), call(stock, guidance_scale=7.0))


def test_distilled_with_a_negative_prompt_projects():
    stock, roll = pipelines(guidance=True)
    plain = call(stock, guidance_scale=3.5, negative_prompt="ugly", true_cfg_scale=7.0)
    ours = call(roll, cfg=7.0, negative_prompt="ugly", **LAG_0)
    assert not torch.equal(ours, plain)
    assert not torch.equal(ours, call(roll, cfg=7.0, negative_prompt="tree", **LAG_0)), "the negative prompt acts"
    assert not torch.equal(call(roll, cfg=7.0, negative_prompt="ugly", **ROLL), ours)


def test_undistilled_takes_the_empty_prompt_if_there_is_no_other():
    stock, roll = pipelines()
    for cfg in (0.0, 1.0):
        assert torch.equal(call(roll, cfg=cfg, **LAG_0), call(stock))
    expected = call(stock, negative_prompt="", true_cfg_scale=4.0)
    assert torch.equal(call(roll, cfg=4.0, **LAG_0), expected)
    assert torch.equal(
        call(roll, cfg=4.0, negative_prompt="ugly", prompt=["a red ball", "a tree"], **LAG_0),
        call(stock, true_cfg_scale=4.0, negative_prompt=["ugly", "ugly"], prompt=["a red ball", "a tree"]),
    )
    roll.card = Card(cfg=4.0)
    assert torch.equal(call(roll, **LAG_0), expected), "the card's"
    assert torch.equal(call(roll, true_cfg_scale=1.0, **LAG_0), call(stock)), "FluxPipeline's arguments act as there"


def test_projected_difference_is_orthogonal_to_x0_and_bounded():
    g = torch.Generator().manual_seed(0)
    x, positive, negative = (torch.randn(3, 500, generator=g) for _ in range(3))
    for sigma in (1.0, 0.3):
        step = project(x, sigma, positive, negative)
        x0 = x - sigma * positive
        cosine = (step * x0).sum(1) / step.norm(dim=1) / x0.norm(dim=1)
        assert cosine.abs().max() < 1e-5
        assert (sigma * step.square().mean(1).sqrt() <= BOUND * (1 + 1e-5)).all()
        # So however large cfg is taken by a node's default, x0 grows by the bound's share at most.
        guided = x0 - sigma * 6 * step
        assert (guided.norm(dim=1) <= (x0.norm(dim=1) ** 2 + 500 * (6 * BOUND) ** 2).sqrt() * (1 + 1e-5)).all()
    tiny = positive + 1e-4 * negative
    along = x - 0.5 * positive
    expected = (positive - tiny) - ((positive - tiny) * along).sum(1, True) / along.square().sum(1, True) * along
    torch.testing.assert_close(project(x, 0.5, positive, tiny), expected, rtol=1e-3, atol=1e-7)


def test_blocks_at_one_level_are_projected_together():
    g = torch.Generator().manual_seed(0)
    whole = [torch.randn(1, 2, 4, 4, generator=g) for _ in range(3)]
    guidance = Guidance(3.5, 4.0, projected=True)
    blocks = [Block(i, 2 * i, 0, 2, 4) for i in range(2)]

    def rows(t: torch.Tensor) -> list[torch.Tensor]:
        return [t[..., b.rows, b.columns] for b in blocks]

    level = torch.tensor(0.5)
    moving = [Moving(b, x, level) for b, x in zip(blocks, rows(whole[0]))]
    parts = guidance.join(moving, rows(whole[1]), rows(whole[2]))
    one = guidance.join([Moving(Block(0, 0, 0, 4, 4), whole[0], level)], [whole[1]], [whole[2]])[0]
    torch.testing.assert_close(torch.cat(parts, 2), one)
    apart = [m._replace(sigma=torch.tensor(s)) for m, s in zip(moving, (0.5, 0.2))]
    assert not torch.allclose(torch.cat(guidance.join(apart, rows(whole[1]), rows(whole[2])), 2), one)


@pytest.mark.parametrize(
    ("distilled", "negative", "given", "expected"),
    [
        (True, False, {}, Guidance(3.5)),
        (True, True, {}, Guidance(3.5)),
        (True, False, {"cfg": 5.0}, Guidance(5.0)),
        (True, True, {"cfg": 5.0}, Guidance(3.5, 5.0, projected=True)),
        (True, True, {"true_cfg_scale": 2.0}, Guidance(3.5, 2.0)),
        (False, False, {}, Guidance(3.5)),
        (False, False, {"cfg": 5.0}, Guidance(3.5, 5.0, fills_in=True)),
        (False, True, {"guidance_scale": 2.0}, Guidance(2.0)),
    ],
)
def test_decisions(distilled, negative, given, expected):
    arguments = {"cfg": None, "guidance_scale": None, "true_cfg_scale": None, **given}
    assert decide(Card(), distilled, negative, **arguments) == expected
