"""A rolling call of FLUX.1 against diffusers' own forward, and against Flux written out token by token."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor2_0
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor, FluxIPAdapterAttnProcessor
from tiny_flux import CONFIG, inputs, model, per_token_flux, rolling
from torch import Tensor, nn

from rolling_diffusion.core.memory import View
from rolling_diffusion.models import call as calls
from rolling_diffusion.models.flux import Flux

T = torch.tensor([0.3, 0.75])
INDEX = torch.arange(3).repeat_interleave(torch.tensor([2, 7, 3]))  # tokens at three levels


@pytest.fixture(autouse=True)
def native_attention():
    """diffusers keeps the backend that a model was last given as the one of every model to come."""
    yield
    model().set_attention_backend("native")


def past(layers: int = 4) -> list[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(5)
    shape = 2, 7, CONFIG["num_attention_heads"], CONFIG["attention_head_dim"]
    return [(torch.randn(shape, generator=g), torch.randn(shape, generator=g)) for _ in range(layers)]


@pytest.mark.parametrize("guidance", [False, True])
@torch.no_grad()
def test_equal_levels_give_the_stock_result_up_to_the_rounding_of_a_larger_matrix_product(guidance: bool):
    flux = model(guidance)
    call = inputs(guidance=guidance)
    expected = flux(**call, timestep=T).sample
    levels = T[:, None].expand(2, 3)
    assert (rolling(flux, call, levels, INDEX) - expected).abs().max() < 1e-6

    # The reason for what difference there is: a product of 8 rows need not round as a product of 2 does. With each
    # row multiplied alone on both sides nothing is left.
    for module in flux.modules():
        if isinstance(module, nn.Linear):
            module.forward = row_by_row(module)
    expected = flux(**call, timestep=T).sample
    assert torch.equal(rolling(flux, call, levels, INDEX), expected)


def row_by_row(linear: nn.Linear):
    def forward(x: Tensor) -> Tensor:
        rows = x.reshape(-1, 1, x.shape[-1])
        return torch.cat([nn.functional.linear(r, linear.weight, linear.bias) for r in rows]).reshape(*x.shape[:-1], -1)

    return forward


@pytest.mark.parametrize("text_level", ["max", "mean", "min"])
@pytest.mark.parametrize("guidance", [False, True])
@torch.no_grad()
def test_each_token_and_the_text_stand_at_their_own_level(text_level: str, guidance: bool):
    flux = model(guidance)
    call = inputs(guidance=guidance)
    levels = torch.tensor([[0.9, 0.5, 0.1], [0.2, 0.8, 0.6]])
    text = {"max": levels.amax(1), "mean": levels.mean(1), "min": levels.amin(1)}[text_level][:, None]
    for index in (INDEX, torch.tensor([0, 1, 2] * 4)):
        expected = per_token_flux(flux, call, levels[:, index], text)
        out = rolling(flux, call, levels, index, text_level=text_level)
        torch.testing.assert_close(out, expected, atol=2e-6, rtol=1e-5)


@torch.no_grad()
def test_memory_is_what_a_dense_call_under_a_mask_would_see():
    """Two calls, the second attending to the first's keys at some weight, against every token of both at once."""
    flux = model()
    call = inputs()
    first, second = torch.arange(6), torch.arange(6, 12)
    levels = torch.tensor([[0.0], [0.0]]), torch.tensor([[0.7], [0.4]])
    kept: dict = {}
    rolling(flux, call, levels[0], tokens=first, keep=kept)
    for bias in (None, torch.full((6,), -0.7)):
        view = View([kept[i] for i in range(4)], bias)
        out = rolling(flux, call, levels[1], tokens=second, memory=view)
        for sample in range(2):
            own = slice(sample, sample + 1)
            rows = {"guidance": None, "txt_ids": call["txt_ids"]}
            rows["hidden_states"] = call["hidden_states"][sample].unflatten(0, (2, 6))
            rows["encoder_hidden_states"] = call["encoder_hidden_states"][own].expand(2, -1, -1)
            rows["pooled_projections"] = call["pooled_projections"][own].expand(2, -1)
            mask = torch.full((22, 22), -torch.inf)  # each call: 5 tokens of text and 6 of the picture
            mask[:11, :11] = mask[11:, 11:] = 0
            mask[11:, 5:11] = 0 if bias is None else -0.7
            image_t = torch.stack([levels[0][sample], levels[1][sample]]).expand(2, 6)
            rows["img_ids"] = call["img_ids"].unflatten(0, (2, 6))
            expected = per_token_flux(flux, rows, image_t, image_t[:, :1], mask)
            torch.testing.assert_close(out[own], expected[1:], atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_modulation_is_computed_once_a_level_not_once_a_token():
    flux = model()
    rows: list[int] = []
    for name, module in flux.named_modules():
        if name.endswith(("norm.linear", "norm1.linear", "norm1_context.linear", "norm_out.linear")):
            module.register_forward_hook(lambda _, args, __: rows.append(args[0].shape[:-1].numel()))
    rolling(flux, inputs(), torch.rand(2, 3), INDEX)
    assert len(rows) == 2 * 2 + 2 + 1 and max(rows) <= 2 * (3 + 1)


@torch.no_grad()
def test_permuting_tokens_permutes_the_output():
    """Up to the order of summation in attention: 1e-5."""
    flux = model()
    call, levels = inputs(), torch.tensor([[0.9, 0.5, 0.1], [0.2, 0.8, 0.6]])
    out = rolling(flux, call, levels, INDEX)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    permuted = rolling(flux, call, levels, INDEX[order], tokens=order)
    torch.testing.assert_close(permuted, out[:, order], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_memory_of_weight_next_to_nothing_is_no_memory_and_one_without_bias_passes_no_mask(monkeypatch):
    flux = model()
    call = inputs()
    expected = flux(**call, timestep=T).sample
    masks, dispatch = [], calls.dispatch_attention_fn

    def watched(*args, attn_mask, **options):
        masks.append(attn_mask)
        return dispatch(*args, attn_mask=attn_mask, **options)

    monkeypatch.setattr(calls, "dispatch_attention_fn", watched)
    faint = rolling(flux, call, T[:, None], memory=View(past(), torch.full((7,), -80.0)))
    torch.testing.assert_close(faint, expected, atol=1e-6, rtol=1e-5)
    assert {m.shape for m in masks} == {(1, 1, 1, 5 + 12 + 7)}
    masks.clear()
    full = rolling(flux, call, T[:, None], memory=View(past()))
    assert masks == [None] * 4 and not torch.allclose(full, expected, atol=1e-3)
    weighed = rolling(flux, call, T[:, None], memory=View(past(), torch.zeros(7)))
    torch.testing.assert_close(weighed, full, atol=1e-6, rtol=1e-5)


def test_gradients_reach_each_sample_through_its_own_levels():
    stock, mine = model(), model()
    call = inputs()
    levels = torch.tensor([[0.9, 0.5, 0.1], [0.2, 0.8, 0.6]])
    text = levels.amax(1, keepdim=True)
    weight = torch.randn(2, 12, 16)
    (rolling(mine, call, levels, INDEX) * weight).sum().backward()
    (per_token_flux(stock, call, levels[:, INDEX], text) * weight).sum().backward()
    for (name, parameter), theirs in zip(mine.named_parameters(), stock.parameters()):
        assert (parameter.grad is None) == (theirs.grad is None), name
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, theirs.grad, atol=1e-4, rtol=1e-3, msg=name)


def test_memory_takes_keys_with_and_without_gradient():
    flux = model()
    pairs = past()
    for key, value in pairs:
        key.requires_grad_(), value.requires_grad_()
    rolling(flux, inputs(), T[:, None], memory=View(pairs)).square().sum().backward()
    assert all(key.grad is not None and key.grad.abs().sum() > 0 for key, _ in pairs)
    flux.zero_grad()
    rolling(flux, inputs(), T[:, None], memory=View(past())).square().sum().backward()
    assert flux.x_embedder.weight.grad is not None


def test_gradient_checkpointing_is_refused_where_it_would_forget_the_levels():
    flux = model()
    flux.enable_gradient_checkpointing()
    with pytest.raises(ValueError, match="disable_gradient_checkpointing"):
        rolling(flux, inputs(), torch.rand(2, 3), INDEX)
    with torch.no_grad():
        assert rolling(flux, inputs(), torch.rand(2, 3), INDEX).isfinite().all()


@pytest.mark.parametrize("repeat", [False, True])
@torch.no_grad()
def test_controlnet_residuals_are_added_as_in_the_stock_model(repeat: bool):
    flux = model()
    call = inputs()
    g = torch.Generator().manual_seed(3)
    residuals = {
        "controlnet_block_samples": [torch.randn(2, 12, 32, generator=g) for _ in range(2 if repeat else 1)],
        "controlnet_single_block_samples": [torch.randn(2, 12, 32, generator=g) for _ in range(2)],
        "controlnet_blocks_repeat": repeat,
    }
    expected = flux(**call, timestep=T, **residuals).sample
    assert torch.allclose(rolling(flux, {**call, **residuals}, T[:, None]), expected, atol=1e-6)
    assert not torch.allclose(expected, flux(**call, timestep=T).sample, atol=1e-2)


@torch.no_grad()
def test_an_ip_adapter_acts_in_a_rolling_call_as_in_the_stock_model():
    flux = model()
    torch.manual_seed(4)
    flux.encoder_hid_proj = nn.Identity()
    for block in flux.transformer_blocks:
        block.attn.set_processor(FluxIPAdapterAttnProcessor(32, 24, scale=0.7))
    for block in flux.single_transformer_blocks:  # as load_ip_adapter does
        block.attn.set_processor(FluxAttnProcessor())
    picture = {"ip_adapter_image_embeds": [torch.randn(2, 4, 24)]}
    call = inputs()
    expected = flux(**call, timestep=T, joint_attention_kwargs=dict(picture)).sample
    told = {**call, "joint_attention_kwargs": picture}
    for _ in range(2):
        assert torch.allclose(rolling(flux, told, T[:, None]), expected, atol=1e-6)
    assert list(picture) == ["ip_adapter_image_embeds"], "what the caller gave is left alone"
    assert all(isinstance(b.attn.processor, FluxIPAdapterAttnProcessor) for b in flux.transformer_blocks)
    for block in flux.transformer_blocks:
        block.attn.processor.scale = [0.0]
    assert not torch.allclose(rolling(flux, told, T[:, None]), expected, atol=1e-3)


@torch.no_grad()
def test_half_precision_and_autocast_run():
    flux = model()
    call, levels = inputs(), torch.rand(2, 3)
    expected = rolling(flux, call, levels, INDEX, View(past(), torch.full((7,), -0.5)))
    with torch.autocast("cpu", torch.bfloat16):
        single = rolling(flux, call, T[:, None])
        torch.testing.assert_close(single, flux(**call, timestep=T).sample, atol=0.02, rtol=0.02)
        out = rolling(flux, call, levels, INDEX, View(past(), torch.full((7,), -0.5)))
        torch.testing.assert_close(out.float(), expected, atol=0.3, rtol=0.1)
    half = {k: v.bfloat16() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in call.items()}
    view = View([(k.bfloat16(), v.bfloat16()) for k, v in past()], torch.full((7,), -0.5))
    out = rolling(copy.deepcopy(flux).to(torch.bfloat16), half, levels.bfloat16(), INDEX, view)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), expected, atol=0.2, rtol=0.2)


def test_unknown_processors_and_text_levels_are_named():
    flux = model()
    assert Flux(flux).refusal(flux) is None
    flux.transformer_blocks[0].attn.set_processor(AttnProcessor2_0())
    assert "AttnProcessor2_0 knows no memory" in str(Flux(flux).refusal(flux))
    with pytest.raises(ValueError, match="text_level is 'median'"):
        rolling(model(), inputs(), torch.rand(2, 3), INDEX, text_level="median")


def test_a_forward_that_somebody_replaced_is_named_and_left_alone():
    flux = model()
    flux.transformer_blocks[0].forward = lambda *args, **kwargs: None
    before = dict(vars(flux.transformer_blocks[0]))
    with pytest.raises(ValueError, match="forward of FluxTransformerBlock was replaced"):
        rolling(flux, inputs(), torch.rand(2, 3), INDEX)
    assert vars(flux.transformer_blocks[0]) == before
    assert "forward" not in vars(flux.time_text_embed), "what was swapped before is as it was"
