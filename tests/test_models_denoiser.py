"""FluxDenoiser: packing, guidance, memory; cached attention against one dense masked computation."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from diffusers import FluxPipeline
from tiny_flux import CHANNELS, grid, models, per_token_flux
from torch import Tensor

from rolling_diffusion.core.order import Block, make_order
from rolling_diffusion.core.plan import make_plan
from rolling_diffusion.core.rollout import Moving, rollout
from rolling_diffusion.core.rule import Rule
from rolling_diffusion.models.denoiser import FluxDenoiser, pack, token_ids, unpack

H, W = 8, 12  # cells
TEXT = 5


def setting(batch: int = 1, seed: int = 0, **kwargs):
    """A stock model, a denoiser over the rolling one with the same weights, and a canvas (B, C, H, W)."""
    stock, rolling = models(guidance="guidance" in kwargs)
    g = torch.Generator().manual_seed(seed)
    embeds, pooled = torch.randn(batch, TEXT, 24, generator=g), torch.randn(batch, 20, generator=g)
    if "cfg" in kwargs:
        kwargs["negative_embeds"] = torch.randn(batch, TEXT, 24, generator=g)
        kwargs["negative_pooled"] = torch.randn(batch, 20, generator=g)
    x = torch.randn(batch, CHANNELS, H, W, generator=g)
    rule = Rule(**{k: kwargs.pop(k) for k in ("persistence", "lookahead", "size") if k in kwargs})
    return stock, FluxDenoiser(rolling, embeds, pooled, rule=rule, **kwargs), x


def cut(x: Tensor, block: Block) -> Tensor:
    return x[:, :, block.rows, block.columns]


def moving(x: Tensor, blocks: list[Block], *sigmas: float) -> list[Moving]:
    levels = sigmas if len(sigmas) > 1 else sigmas * len(blocks)
    return [Moving(block, cut(x, block), torch.tensor(sigma)) for block, sigma in zip(blocks, levels)]


def record(denoiser: FluxDenoiser) -> list[dict]:
    """The keyword arguments of each call of the transformer from now on."""
    calls: list[dict] = []
    denoiser.transformer.register_forward_pre_hook(lambda _, args, kwargs: calls.append(kwargs), with_kwargs=True)
    return calls


def test_tokens_are_packed_and_placed_as_in_flux_pipeline():
    x = torch.randn(2, CHANNELS, H, W)
    assert torch.equal(pack(x), FluxPipeline._pack_latents(x, 2, CHANNELS, H, W))
    assert torch.equal(unpack(pack(x), H, W), x)
    ids = FluxPipeline._prepare_latent_image_ids(2, H // 2, W // 2, torch.device("cpu"), torch.float32)
    assert torch.equal(token_ids(Block(0, 0, 0, H, W)).float(), ids)
    corner = ids.unflatten(0, (H // 2, W // 2))[2:4, 1:4].flatten(0, 1)
    assert torch.equal(token_ids(Block(3, 4, 2, 4, 6)).float(), corner)
    with pytest.raises(ValueError, match="multiples of 2 cells"):
        token_ids(Block(0, 3, 0, 2, 2))


@pytest.mark.parametrize("batch_cfg", [None, False, True])
@pytest.mark.parametrize("guidance", [False, True])
@torch.no_grad()
def test_blocks_of_one_level_are_the_stock_model_on_the_whole_canvas_bit_for_bit(
    guidance: bool, batch_cfg: bool | None
):
    options: dict = {} if batch_cfg is None else {"cfg": 2.5, "batch_cfg": batch_cfg}
    stock, denoiser, x = setting(batch=2, **options, **({"guidance": 3.5} if guidance else {}))
    sigma = torch.tensor(0.7)

    def velocity(embeds: Tensor, pooled: Tensor) -> Tensor:
        n = len(embeds)
        v = stock(
            pack(x).repeat(n // 2, 1, 1),
            embeds,
            pooled,
            (sigma * 1000).expand(n) / 1000,
            grid(H // 2, W // 2),
            torch.zeros(TEXT, 3),
            torch.full((n,), 3.5) if guidance else None,
        ).sample
        return unpack(v, H, W)

    branches = [velocity(embeds, pooled) for embeds, pooled, *_ in denoiser._branches]
    positive, *rest = branches[0].chunk(2) if batch_cfg else branches
    expected = rest[0] + 2.5 * (positive - rest[0]) if rest else positive
    for order in ("top-to-bottom", "left-to-right", "spiral-out", "random"):
        blocks = list(make_order(order, H, W, 4))
        call = moving(x, blocks, 0.7)
        for block, v, x0 in zip(blocks, denoiser.velocity(call), denoiser.denoise(call)):
            assert torch.equal(v, cut(expected, block))
            assert torch.equal(x0, cut(x - sigma * expected, block))


@torch.no_grad()
def test_the_order_in_which_blocks_are_given_only_permutes_the_answers():
    """Up to the order of summation in attention: 1e-5."""
    _, denoiser, x = setting()
    blocks = list(make_order("spiral-out", H, W, 4))
    sigmas = [0.2, 0.4, 0.4, 0.6, 0.8, 1.0]
    call = [Moving(b, cut(x, b), torch.tensor(s)) for b, s in zip(blocks, sigmas)]
    answers = denoiser.denoise(call)
    permuted = denoiser.denoise(call[::-1])[::-1]
    for one, other in zip(answers, permuted):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("persistence", [1.0, 0.5])
@torch.no_grad()
def test_committing_block_by_block_equals_one_dense_computation_under_a_block_causal_mask(persistence: float):
    """Flux's text attends both ways, so each call has a text of its own: row g of the dense computation is the call for
    block g, and its tokens see their own text, their own block, and the image tokens of earlier rows, a ln p lower."""
    stock, denoiser, x = setting(persistence=persistence, size=2)
    blocks = list(make_order("top-to-bottom", H, W, 2))
    for block in blocks[:-1]:
        denoiser.commit(block, cut(x, block))
    v = denoiser.velocity(moving(x, [blocks[-1]], 0.6))[0]

    n, tokens = len(blocks), blocks[0].cells // 4
    rows = torch.arange(n).repeat_interleave(TEXT + H * W // 4)  # the call of each token of the dense computation
    owner = torch.cat([torch.full((TEXT,), -1), torch.arange(n).repeat_interleave(tokens)]).repeat(n)  # -1: text
    own = (rows[:, None] == rows) & ((owner == -1) | (owner == rows))
    past = (owner == rows) & (rows < rows[:, None])
    age = (rows[:, None] - rows) * math.log(persistence)
    bias = torch.full(own.shape, -torch.inf).masked_fill(own, 0.0)
    bias = torch.where(past, age, bias)
    call = {
        "hidden_states": pack(x).expand(n, -1, -1),
        "encoder_hidden_states": denoiser._branches[0][0].expand(n, -1, -1),
        "pooled_projections": denoiser._branches[0][1].expand(n, -1),
        "img_ids": grid(H // 2, W // 2),
        "txt_ids": torch.zeros(TEXT, 3),
        "guidance": None,
    }
    levels = torch.tensor([0.0] * (n - 1) + [0.6])[:, None]
    dense = per_token_flux(stock, call, levels.expand(-1, H * W // 4), levels, bias)
    torch.testing.assert_close(v, cut(unpack(dense[-1:], H, W), blocks[-1]), atol=5e-6, rtol=1e-5)
    alone = setting(persistence=0.0)[1].velocity(moving(x, [blocks[-1]], 0.6))[0]
    assert not torch.allclose(v, alone, atol=1e-3), "memory matters in this test"


@pytest.mark.parametrize("commit_waiting", [True, False])
@pytest.mark.parametrize("lookahead", [None, 2])
@torch.no_grad()
def test_seeing_finished_and_waiting_blocks_equals_one_dense_computation(lookahead: int | None, commit_waiting: bool):
    """Three calls in three rows: all blocks as noise (waiting), block 0 clean (finished), blocks 1 and 2 in motion."""
    stock, denoiser, x = setting(lookahead=lookahead, commit_waiting=commit_waiting, persistence=0.7, size=2)
    blocks = list(make_order("top-to-bottom", H, W, 2))
    denoiser.denoise(moving(x, blocks, 1.0), keep=True)
    denoiser.start(blocks[0])
    clean = torch.randn_like(x)
    denoiser.commit(blocks[0], cut(clean, blocks[0]))
    for block in blocks[1:3]:
        denoiser.start(block)
    answers = denoiser.velocity(moving(0.5 * x, blocks[1:3], 0.4, 0.8))

    tokens = blocks[0].cells // 4
    row = torch.arange(3).repeat_interleave(TEXT + H * W // 4)
    owner = torch.cat([torch.full((TEXT,), -1), torch.arange(4).repeat_interleave(tokens)]).repeat(3)
    same = row[:, None] == row
    bias = torch.full(same.shape, -torch.inf)
    bias[same & (row == 0)] = 0
    bias[same & (row == 1) & (owner <= 0)] = 0
    if commit_waiting:  # of the blocks that wait, those within reach of block 0
        bias[(row[:, None] == 1) & (row == 0) & ((owner == 1) | (owner > 1) & (lookahead is None))] = 0
    bias[same & (row == 2) & (owner != 0) & (owner != 3)] = 0
    bias[(row[:, None] == 2) & (row == 1) & (owner == 0)] = math.log(0.7)
    bias[(row[:, None] == 2) & (row == 0) & (owner == 3)] = 0  # block 3 waits, and touches block 2
    call = {
        "hidden_states": pack(torch.cat([x, clean, 0.5 * x])),
        "encoder_hidden_states": denoiser._branches[0][0].expand(3, -1, -1),
        "pooled_projections": denoiser._branches[0][1].expand(3, -1),
        "img_ids": grid(H // 2, W // 2),
        "txt_ids": torch.zeros(TEXT, 3),
        "guidance": None,
    }
    levels = torch.tensor([[1.0] * 4, [0.0] * 4, [0.4, 0.4, 0.8, 0.8]]).repeat_interleave(tokens, 1)
    dense = unpack(per_token_flux(stock, call, levels, torch.tensor([[1.0], [0.0], [0.8]]), bias)[2:], H, W)
    for block, v in zip(blocks[1:3], answers):
        torch.testing.assert_close(v, cut(dense, block), atol=5e-6, rtol=1e-5)


@torch.no_grad()
def test_persistence_zero_and_lookahead_zero_cost_nothing():
    _, denoiser, x = setting(persistence=0.0, lookahead=0)
    plain = setting(persistence=0.0, lookahead=0)[1]
    calls = record(denoiser)
    blocks = list(make_order("raster", H, W, 4))
    for block in blocks:
        denoiser.commit(block, cut(x, block))
    assert not calls, "commit is no model call"
    answers = denoiser.denoise(moving(x, blocks, 1.0), keep=True)
    assert all(m.tokens == 0 for m in denoiser.memories) and "keep" not in calls[0]
    assert all(torch.equal(a, b) for a, b in zip(answers, plain.denoise(moving(x, blocks, 1.0))))


@pytest.mark.parametrize("order", ["left-to-right", "spiral-out"])
@torch.no_grad()
def test_waiting_blocks_are_stored_block_by_block_in_any_order_and_leave_when_they_start(order: str):
    _, denoiser, x = setting(size=4)
    blocks = list(make_order(order, H, W, 4))
    denoiser.denoise(moving(x, blocks, 1.0), keep=True)
    (memory,) = denoiser.memories
    assert memory.tokens == H * W // 4

    kept: dict = {}  # what one stock-ordered call computes
    embeds, pooled, text_ids, *_ = denoiser._branches[0]
    denoiser.transformer(pack(x), embeds, pooled, torch.ones(1), token_ids(Block(0, 0, 0, H, W)), text_ids, keep=kept)
    for layer, (key, _) in kept.items():
        whole = key.unflatten(1, (H // 2, W // 2))
        for block in blocks:
            mine = memory._stored["waiting"][block][layer][0]
            rows = slice(block.top // 2, (block.top + block.height) // 2)
            columns = slice(block.left // 2, (block.left + block.width) // 2)
            assert torch.equal(mine, whole[:, rows, columns].flatten(1, 2))
    for block in blocks:
        denoiser.start(block)
    assert memory.tokens == 0
    denoiser.denoise(moving(x, blocks, 1.0), keep=True)
    denoiser.clear()
    assert memory.tokens == 0


@torch.no_grad()
def test_guidance_in_one_call_or_two_is_the_same_with_memory_for_each_branch():
    answers = []
    for batch_cfg in (True, False):
        _, denoiser, x = setting(batch=2, cfg=3.0, batch_cfg=batch_cfg, size=4)
        blocks = list(make_order("left-to-right", H, W, 4))
        denoiser.denoise(moving(x, blocks, 1.0), keep=True)
        denoiser.start(blocks[0])
        denoiser.commit(blocks[0], cut(x, blocks[0]))
        denoiser.start(blocks[1])
        answers.append(denoiser.denoise(moving(x, blocks[1:2], 0.5))[0])
        assert len(denoiser.memories) == (1 if batch_cfg else 2)
    torch.testing.assert_close(answers[0], answers[1], atol=2e-5, rtol=1e-5)


@torch.no_grad()
def test_joint_attention_kwargs_reach_the_model_each_branch_its_own():
    scale = {"scale": 0.5}
    for options, expected in (
        ({}, [None]),
        ({"joint_attention_kwargs": scale}, [scale]),
        ({"joint_attention_kwargs": scale, "cfg": 2.0}, [scale]),
        ({"joint_attention_kwargs": scale, "cfg": 2.0, "batch_cfg": False}, [scale, scale]),
        ({"negative_joint_attention_kwargs": scale, "cfg": 2.0, "batch_cfg": False}, [None, scale]),
    ):
        _, denoiser, x = setting(**options)
        calls = record(denoiser)
        denoiser.denoise(moving(x, [Block(0, 0, 0, H, W)], 0.5))
        assert [call.get("joint_attention_kwargs") for call in calls] == expected
    with pytest.raises(ValueError, match="batch_cfg=False"):
        setting(negative_joint_attention_kwargs=scale, cfg=2.0)


@torch.no_grad()
def test_one_prompt_serves_a_batch_of_latents():
    _, denoiser, x = setting(cfg=2.0)
    _, other, _ = setting(cfg=2.0)
    twice = torch.cat([x, 2 * x])
    block = [Block(0, 0, 0, H, W)]
    both = denoiser.denoise(moving(twice, block, 0.5))[0]
    for i in range(2):
        torch.testing.assert_close(
            both[i : i + 1], other.denoise(moving(twice[i : i + 1], block, 0.5))[0], atol=1e-5, rtol=1e-5
        )


@torch.no_grad()
def test_context_noise_is_drawn_per_block_from_the_seed_and_told_to_the_model():
    blocks = list(make_order("top-to-bottom", H, W, 4))
    stored = []
    for seed, sigma in ((1, 0.1), (1, 0.1), (2, 0.1), (1, 0.0)):
        _, denoiser, x = setting(context_noise=sigma, size=4)
        denoiser.seed = seed
        calls = record(denoiser)
        denoiser.commit(blocks[0], cut(x, blocks[0]))
        assert torch.allclose(calls[0]["timestep"], torch.tensor(sigma))
        stored.append(denoiser.memories[0].view([blocks[1]]).layer(1)[0])
    assert torch.equal(stored[0], stored[1])
    assert not torch.allclose(stored[0], stored[2], atol=1e-3)
    assert not torch.allclose(stored[0], stored[3], atol=1e-3)


def euler(model, x: Tensor, sigmas: Tensor, extra_args=None, callback=None, disable=None) -> Tensor:
    for i in range(len(sigmas) - 1):
        denoised = model(x, sigmas[i].expand(len(x)), **(extra_args or {}))
        if callback is not None:
            callback({"x": x, "i": i, "sigma": sigmas[i], "sigma_hat": sigmas[i], "denoised": denoised})
        x = x + (sigmas[i + 1] - sigmas[i]) * (x - denoised) / sigmas[i]
    return x


@pytest.mark.parametrize("order", ["top-to-bottom", "spiral-out"])
@torch.no_grad()
def test_lag_zero_is_the_plain_loop_over_the_stock_model_bit_for_bit(order: str):
    stock, denoiser, x = setting()
    plan = make_plan(H, W, 4, order, window=4, overlap=2, lag=0)
    sigmas = torch.linspace(1, 0, 5)
    embeds, pooled, text_ids, *_ = denoiser._branches[0]

    def plain(x: Tensor, sigma: Tensor, **_) -> Tensor:
        t = sigma * 1000 / 1000  # FluxPipeline's own detour
        v = stock(pack(x), embeds, pooled, t, grid(H // 2, W // 2), text_ids).sample
        return x - sigma * unpack(v, H, W)

    expected = euler(plain, x, sigmas)
    for block, part in rollout(plan, denoiser, euler, sigmas, partial(cut, x)):
        assert torch.equal(part, cut(expected, block))


@pytest.mark.parametrize("persistence, lookahead", [(1.0, None), (0.2, 2), (0.0, None), (1.0, 0)])
@pytest.mark.parametrize("order", ["left-to-right", "spiral-out"])
@torch.no_grad()
def test_a_rollout_computes_and_sees_as_many_tokens_as_its_plan_predicts(
    order: str, persistence: float, lookahead: int | None
):
    for draft, lag in ((0, None), (1, "autoregressive"), (2, 1)):
        plan = make_plan(H, W, 3, order, 6, 4, draft, lookahead, lag=lag, persistence=persistence)
        _, denoiser, x = setting(persistence=persistence, lookahead=lookahead, size=plan.size)
        calls = record(denoiser)
        done = dict(rollout(plan, denoiser, euler, torch.linspace(1, 0, 4), partial(cut, x)))
        assert len(done) == len(plan.blocks) and all(part.isfinite().all() for part in done.values())
        cost = plan.cost(TEXT)
        assert len(calls) == cost.ticks + cost.waiting_calls + cost.commits
        assert sum(call["hidden_states"].shape[1] + TEXT for call in calls) == cost.token_evaluations
        visible, pairs = [], 0
        for i, call in enumerate(calls):
            memory, own = call.get("memory"), TEXT + call["hidden_states"].shape[1]
            seen = 0 if memory is None else memory.layer(0)[0].shape[1]
            pairs += own * (own + seen)
            if i >= draft and call.get("keep") is None:
                visible.append(own + seen)
        assert max(visible) == cost.peak_visible_tokens
        assert pairs == cost.pairs


def test_gradients_never_flow_from_a_later_block_into_a_committed_one():
    _, denoiser, x = setting(size=4)
    blocks = list(make_order("top-to-bottom", H, W, 4))
    first, second = (cut(x, block).clone().requires_grad_() for block in blocks)
    denoiser.commit(blocks[0], first)
    answer = denoiser.denoise([Moving(blocks[1], second, torch.tensor(0.5))])[0]
    answer.square().sum().backward()
    assert second.grad is not None and second.grad.abs().sum() > 0
    assert first.grad is None


@torch.no_grad()
def test_latents_keep_their_dtype_while_the_model_computes_in_its_own():
    _, rolling = models()
    rolling.to(torch.bfloat16)
    denoiser = FluxDenoiser(rolling, torch.randn(1, TEXT, 24).bfloat16(), torch.randn(1, 20).bfloat16())
    x = torch.randn(1, CHANNELS, H, W)
    assert denoiser.denoise(moving(x, [Block(0, 0, 0, H, W)], 0.5))[0].dtype == torch.float32
    wide = Block(0, 0, 2 * 300, 2, 4)  # beyond 256 tokens, where bf16 positions would no longer be exact
    calls = record(denoiser)
    denoiser.denoise([Moving(wide, torch.randn(1, CHANNELS, 2, 4), torch.tensor(0.5))])
    assert calls[0]["img_ids"][:, 2].tolist() == [300.0, 301.0]


def test_bad_settings_are_named():
    _, rolling = models()
    _, distilled = models(guidance=True)
    embeds, pooled = torch.randn(1, TEXT, 24), torch.randn(1, 20)
    with pytest.raises(ValueError, match="give guidance"):
        FluxDenoiser(distilled, embeds, pooled)
    with pytest.raises(ValueError, match="negative_embeds"):
        FluxDenoiser(rolling, embeds, pooled, cfg=2.0)
    with pytest.raises(ValueError, match="batch_cfg=False"):
        FluxDenoiser(rolling, embeds, pooled, cfg=2.0, negative_embeds=embeds[:, :3], negative_pooled=pooled)
    with pytest.raises(ValueError, match="context_noise is 1"):
        FluxDenoiser(rolling, embeds, pooled, context_noise=1.0)
    with pytest.raises(ValueError, match="text_level is 'most'"):
        FluxDenoiser(rolling, embeds, pooled, text_level="most")
    three = FluxDenoiser(rolling, embeds.repeat(3, 1, 1), pooled.repeat(3, 1))
    with pytest.raises(ValueError, match="3 prompts meet 2 latents"):
        three.denoise([Moving(Block(0, 0, 0, 2, 2), torch.randn(2, CHANNELS, 2, 2), torch.tensor(0.5))])
