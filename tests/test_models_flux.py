"""The rolling Flux transformer against diffusers' own, and against Flux written out token by token."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers import FluxTransformer2DModel
from diffusers.models.attention_processor import AttnProcessor2_0
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor, FluxIPAdapterAttnProcessor
from peft import LoraConfig
from tiny_flux import CONFIG, inputs, models, per_token_flux
from torch import Tensor, nn

from rolling_diffusion.core.memory import View
from rolling_diffusion.models.flux import RollingFluxTransformer2DModel

T = torch.tensor([0.3, 0.75])


@pytest.fixture(autouse=True)
def native_attention():
    """diffusers keeps the backend that a model was last given as the one of every model to come."""
    yield
    models()[0].set_attention_backend("native")


def past(layers: int = 4, tokens: int = 7, batch: int = 2, seed: int = 5) -> list[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(seed)
    shape = batch, tokens, CONFIG["num_attention_heads"], CONFIG["attention_head_dim"]
    return [(torch.randn(shape, generator=g), torch.randn(shape, generator=g)) for _ in range(layers)]


@pytest.mark.parametrize("guidance", [False, True])
@torch.no_grad()
def test_stock_arguments_and_a_single_level_are_the_stock_model_bit_for_bit(guidance: bool):
    stock, rolling = models(guidance)
    call = inputs(guidance=guidance)
    expected = stock(**call, timestep=T).sample
    assert torch.equal(rolling(**call, timestep=T).sample, expected)
    assert torch.equal(rolling(**call, timestep=T, return_dict=False)[0], expected)
    assert torch.equal(rolling(**call, timestep=T[:, None], ranges=[12]).sample, expected)
    kept: dict = {}
    assert torch.equal(rolling(**call, timestep=T, keep=kept).sample, expected)
    assert list(kept) == [0, 1, 2, 3] and {k.shape for k, _ in kept.values()} == {(2, 12, 2, 16)}


@pytest.mark.parametrize("guidance", [False, True])
@torch.no_grad()
def test_equal_levels_give_the_stock_result_up_to_the_rounding_of_a_larger_matrix_product(guidance: bool):
    stock, rolling = models(guidance)
    call = inputs(guidance=guidance)
    expected = stock(**call, timestep=T).sample
    levels = T[:, None].expand(2, 3)
    assert (rolling(**call, timestep=levels, ranges=[3, 3, 6]).sample - expected).abs().max() < 1e-6

    # The reason for what difference there is: a product of 8 rows need not round as a product of 2 does. With each
    # row multiplied alone on both sides nothing is left.
    for model in (stock, rolling):
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.forward = row_by_row(module)
    expected = stock(**call, timestep=T).sample
    assert torch.equal(rolling(**call, timestep=levels, ranges=[3, 3, 6]).sample, expected)


def row_by_row(linear: nn.Linear):
    def forward(x: Tensor) -> Tensor:
        rows = x.reshape(-1, 1, x.shape[-1])
        return torch.cat([nn.functional.linear(r, linear.weight, linear.bias) for r in rows]).reshape(*x.shape[:-1], -1)

    return forward


@pytest.mark.parametrize("text_level", ["max", "mean", "min"])
@pytest.mark.parametrize("guidance", [False, True])
@torch.no_grad()
def test_each_range_and_the_text_stand_at_their_own_level(text_level: str, guidance: bool):
    stock, rolling = models(guidance)
    call = inputs(guidance=guidance)
    levels = torch.tensor([[0.9, 0.5, 0.1], [0.2, 0.8, 0.6]])
    counts = torch.tensor([2, 7, 3])
    text = {"max": levels.amax(1), "mean": levels.mean(1), "min": levels.amin(1)}[text_level][:, None]
    expected = per_token_flux(stock, call, levels.repeat_interleave(counts, 1), text)
    out = rolling(**call, timestep=levels, ranges=counts.tolist(), text_level=text_level).sample
    torch.testing.assert_close(out, expected, atol=2e-6, rtol=1e-5)

    index = torch.tensor([0, 1, 2] * 4)  # interleaved levels, given token by token
    expected = per_token_flux(stock, call, levels[:, index], text)
    out = rolling(**call, timestep=levels, ranges=index, text_level=text_level).sample
    torch.testing.assert_close(out, expected, atol=2e-6, rtol=1e-5)


@torch.no_grad()
def test_modulation_is_computed_once_a_level_not_once_a_token():
    _, rolling = models()
    rows: list[int] = []
    for name, module in rolling.named_modules():
        if name.endswith(("norm.linear", "norm1.linear", "norm1_context.linear", "norm_out.linear")):
            module.register_forward_hook(lambda _, args, __: rows.append(args[0].shape[:-1].numel()))
    rolling(**inputs(), timestep=torch.rand(2, 3), ranges=[2, 7, 3])
    assert len(rows) == 2 * 2 + 2 + 1 and max(rows) <= 2 * (3 + 1)


@torch.no_grad()
def test_permuting_blocks_permutes_the_output():
    """Up to the order of summation in attention: 1e-5."""
    _, rolling = models()
    call, levels = inputs(), torch.tensor([[0.9, 0.5, 0.1], [0.2, 0.8, 0.6]])
    out = rolling(**call, timestep=levels, ranges=[2, 7, 3]).sample.split([2, 7, 3], 1)
    x, ids = call["hidden_states"].split([2, 7, 3], 1), call["img_ids"].split([2, 7, 3])
    for order in ([2, 0, 1], [1, 0, 2]):
        call["hidden_states"], call["img_ids"] = torch.cat([x[i] for i in order], 1), torch.cat([ids[i] for i in order])
        permuted = rolling(**call, timestep=levels[:, order], ranges=[[2, 7, 3][i] for i in order]).sample
        torch.testing.assert_close(permuted, torch.cat([out[i] for i in order], 1), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_memory_of_weight_next_to_nothing_is_no_memory_and_one_without_bias_passes_no_mask(monkeypatch):
    stock, rolling = models()
    call = inputs()
    expected = stock(**call, timestep=T).sample
    masks = []
    from rolling_diffusion.models import blocks

    dispatch = blocks.dispatch_attention_fn
    monkeypatch.setattr(
        blocks,
        "dispatch_attention_fn",
        lambda *a, attn_mask, **k: masks.append(attn_mask) or dispatch(*a, attn_mask=attn_mask, **k),
    )
    faint = rolling(**call, timestep=T, memory=View(past(), torch.full((7,), -80.0))).sample
    torch.testing.assert_close(faint, expected, atol=1e-6, rtol=1e-5)
    assert {m.shape for m in masks} == {(1, 1, 1, 5 + 12 + 7)}
    masks.clear()
    full = rolling(**call, timestep=T, memory=View(past())).sample
    assert masks == [None] * 4 and not torch.allclose(full, expected, atol=1e-3)
    weighed = rolling(**call, timestep=T, memory=View(past(), torch.zeros(7))).sample
    torch.testing.assert_close(weighed, full, atol=1e-6, rtol=1e-5)


def test_gradients_reach_each_sample_through_its_own_levels():
    stock, rolling = models()
    call, counts = inputs(), torch.tensor([2, 7, 3])
    levels = torch.tensor([[0.9, 0.5, 0.1], [0.2, 0.8, 0.6]])
    text = levels.amax(1, keepdim=True)
    weight = torch.randn(2, 12, 16)
    (rolling(**call, timestep=levels, ranges=counts.tolist()).sample * weight).sum().backward()
    (per_token_flux(stock, call, levels.repeat_interleave(counts, 1), text) * weight).sum().backward()
    for (name, mine), theirs in zip(rolling.named_parameters(), stock.parameters()):
        assert (mine.grad is None) == (theirs.grad is None), name
        if mine.grad is not None:
            torch.testing.assert_close(mine.grad, theirs.grad, atol=1e-4, rtol=1e-3, msg=name)


def test_gradient_checkpointing_changes_no_gradient_and_no_kept_key():
    _, plain = models()
    saving = copy.deepcopy(plain)
    saving.enable_gradient_checkpointing()
    levels, results = torch.rand(2, 3), []
    for model in (plain, saving):
        model.train()
        kept: dict = {}
        out = model(**inputs(), timestep=levels, ranges=[2, 7, 3], memory=View(past()), keep=kept).sample
        out.square().sum().backward()
        results.append((out, [p.grad for p in model.parameters()], kept))
    assert torch.equal(results[0][0], results[1][0])
    for mine, theirs in zip(results[0][1], results[1][1]):
        assert (mine is None and theirs is None) or torch.equal(mine, theirs)
    assert all(torch.equal(results[0][2][i][0], results[1][2][i][0]) for i in range(4))


def test_memory_takes_keys_with_and_without_gradient():
    _, rolling = models()
    pairs = past()
    for key, value in pairs:
        key.requires_grad_(), value.requires_grad_()
    rolling(**inputs(), timestep=T, memory=View(pairs)).sample.square().sum().backward()
    assert all(key.grad is not None and key.grad.abs().sum() > 0 for key, _ in pairs)
    rolling.zero_grad()
    rolling(**inputs(), timestep=T, memory=View(past())).sample.square().sum().backward()
    assert rolling.x_embedder.weight.grad is not None


@pytest.mark.parametrize("repeat", [False, True])
@torch.no_grad()
def test_controlnet_residuals_are_added_as_in_the_stock_model(repeat: bool):
    stock, rolling = models()
    call = inputs()
    g = torch.Generator().manual_seed(3)
    residuals = {
        "controlnet_block_samples": [torch.randn(2, 12, 32, generator=g) for _ in range(2 if repeat else 1)],
        "controlnet_single_block_samples": [torch.randn(2, 12, 32, generator=g) for _ in range(2)],
        "controlnet_blocks_repeat": repeat,
    }
    expected = stock(**call, timestep=T, **residuals).sample
    assert torch.equal(rolling(**call, timestep=T, keep={}, **residuals).sample, expected)
    assert not torch.allclose(expected, stock(**call, timestep=T).sample, atol=1e-2)


@torch.no_grad()
def test_an_ip_adapter_acts_in_a_rolling_call_as_in_the_stock_model_and_can_be_unloaded():
    stock, rolling = models()
    for model in (stock, rolling):
        torch.manual_seed(4)
        model.encoder_hid_proj = nn.Identity()
        for block in model.transformer_blocks:
            block.attn.set_processor(FluxIPAdapterAttnProcessor(32, 24, scale=0.7))
        for block in model.single_transformer_blocks:  # as load_ip_adapter does
            block.attn.set_processor(FluxAttnProcessor())
    picture = {"ip_adapter_image_embeds": [torch.randn(2, 4, 24)]}
    call = inputs()
    expected = stock(**call, timestep=T, joint_attention_kwargs=dict(picture)).sample
    assert torch.equal(rolling(**call, timestep=T, joint_attention_kwargs=dict(picture)).sample, expected)
    assert torch.equal(rolling(**call, timestep=T, joint_attention_kwargs=dict(picture), keep={}).sample, expected)
    assert torch.equal(rolling(**call, timestep=T, joint_attention_kwargs=dict(picture)).sample, expected)
    assert all(isinstance(b.attn.processor, FluxIPAdapterAttnProcessor) for b in rolling.transformer_blocks)
    for block in rolling.transformer_blocks:  # as unload_ip_adapter does
        block.attn.set_processor(FluxAttnProcessor())
    without = rolling(**call, timestep=T, keep={}).sample
    assert torch.equal(without, models()[0](**call, timestep=T).sample)
    assert not torch.allclose(without, expected, atol=1e-3)


@torch.no_grad()
def test_weights_travel_both_ways_between_the_folders_of_the_two_classes(tmp_path):
    stock, rolling = models(guidance=True)
    call = inputs(guidance=True)
    expected = stock(**call, timestep=T).sample
    stock.save_pretrained(tmp_path / "stock")
    rolling.save_pretrained(tmp_path / "rolling")
    read = RollingFluxTransformer2DModel.from_pretrained(tmp_path / "stock")
    assert dict(read.config)["guidance_embeds"] is True
    assert torch.equal(read(**call, timestep=T, keep={}).sample, expected)
    back = FluxTransformer2DModel.from_pretrained(tmp_path / "rolling")
    assert torch.equal(back(**call, timestep=T).sample, expected)


@torch.no_grad()
def test_a_loaded_model_becomes_a_rolling_one_in_place_with_its_lora_and_its_attention_backend():
    stock, _ = models()
    stock.set_attention_backend("_native_math")
    stock.add_adapter(LoraConfig(r=2, target_modules=["to_q", "proj_mlp"], init_lora_weights=False))
    call = inputs()
    expected = stock(**call, timestep=T).sample
    rolling = RollingFluxTransformer2DModel.from_stock(stock)
    assert rolling is stock and isinstance(rolling, RollingFluxTransformer2DModel)
    assert rolling.transformer_blocks[0].attn.processor._attention_backend is not None
    assert torch.equal(rolling(**call, timestep=T, keep={}).sample, expected)

    half = rolling(**call, timestep=T, keep={}, joint_attention_kwargs={"scale": 0.5}).sample
    assert not torch.allclose(half, expected, atol=1e-4)
    assert torch.equal(half, rolling(**call, timestep=T, joint_attention_kwargs={"scale": 0.5}).sample)
    rolling.disable_adapters()
    plain, _ = models()
    plain.set_attention_backend("_native_math")
    assert torch.equal(rolling(**call, timestep=T, keep={}).sample, plain(**call, timestep=T).sample)

    hooked, _ = models()
    hooked.enable_group_offload(torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1)
    with pytest.raises(ValueError, match="offload"):
        RollingFluxTransformer2DModel.from_stock(hooked)


@torch.no_grad()
def test_backends_fused_projections_casting_and_offload_give_the_same_rolling_result():
    _, rolling = models()
    call = {
        **inputs(),
        "timestep": torch.rand(2, 3),
        "ranges": [2, 7, 3],
        "memory": View(past(), torch.full((7,), -0.5)),
    }
    expected = rolling(**call).sample

    other = copy.deepcopy(rolling)
    other.set_attention_backend("_native_math")
    torch.testing.assert_close(other(**call).sample, expected, atol=1e-6, rtol=1e-5)
    other.set_attention_backend("native")

    other = copy.deepcopy(rolling)
    other.fuse_qkv_projections()
    torch.testing.assert_close(other(**call).sample, expected, atol=1e-6, rtol=1e-5)

    for kind in ({"offload_type": "leaf_level"}, {"offload_type": "block_level", "num_blocks_per_group": 1}):
        other = copy.deepcopy(rolling)
        other.enable_group_offload(torch.device("cpu"), torch.device("cpu"), **kind)
        assert torch.equal(other(**call).sample, expected)

    other = copy.deepcopy(rolling)
    other.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    assert other.transformer_blocks[0].attn.to_q.weight.dtype == torch.bfloat16
    torch.testing.assert_close(other(**call).sample, expected, atol=0.05, rtol=0.05)


@torch.no_grad()
def test_whole_and_regional_compilation_trace_without_a_graph_break():
    _, rolling = models()
    call = {
        **inputs(),
        "timestep": torch.rand(2, 3),
        "ranges": [2, 7, 3],
        "memory": View(past(), torch.full((7,), -0.5)),
    }
    expected = rolling(**call).sample
    kept: dict = {}
    compiled = torch.compile(rolling, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(**call, keep=kept).sample, expected, atol=1e-6, rtol=1e-5)
    assert list(kept) == [0, 1, 2, 3]

    torch._dynamo.reset()
    regional = copy.deepcopy(rolling)
    regional.compile_repeated_blocks(backend="eager", fullgraph=True)
    torch.testing.assert_close(regional(**call).sample, expected, atol=1e-6, rtol=1e-5)
    torch._dynamo.reset()


@torch.no_grad()
def test_half_precision_and_autocast_run():
    stock, rolling = models()
    call = {
        **inputs(),
        "timestep": torch.rand(2, 3),
        "ranges": [2, 7, 3],
        "memory": View(past(), torch.full((7,), -0.5)),
    }
    expected = rolling(**call).sample
    with torch.autocast("cpu", torch.bfloat16):
        single = rolling(**inputs(), timestep=T, keep={}).sample
        assert torch.equal(single, stock(**inputs(), timestep=T).sample)
        torch.testing.assert_close(rolling(**call).sample.float(), expected, atol=0.3, rtol=0.1)
    half = {k: v.bfloat16() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in call.items()}
    half["memory"] = View([(k.bfloat16(), v.bfloat16()) for k, v in past()], torch.full((7,), -0.5))
    out = rolling.to(torch.bfloat16)(**half).sample
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), expected, atol=0.2, rtol=0.2)


def test_wrong_ranges_levels_and_processors_are_named():
    _, rolling = models()
    other = copy.deepcopy(rolling)
    other.transformer_blocks[0].attn.set_processor(AttnProcessor2_0())
    with pytest.raises(ValueError, match="AttnProcessor2_0 knows no memory"):
        other(**inputs(), timestep=torch.rand(2, 2), ranges=[6, 6])
    with pytest.raises(ValueError, match="needs img_ids"):
        rolling(**{**inputs(), "img_ids": None}, timestep=T, keep={})
    with pytest.raises(ValueError, match=r"ranges \[3, 3\] do not fit 12 image tokens"):
        rolling(**inputs(), timestep=torch.rand(2, 2), ranges=[3, 3])
    with pytest.raises(ValueError, match=r"at 3 noise levels"):
        rolling(**inputs(), timestep=torch.rand(2, 3), ranges=[6, 6])
    with pytest.raises(ValueError, match="text_level is 'median'"):
        rolling(**inputs(), timestep=torch.rand(2, 2), ranges=[6, 6], text_level="median")
