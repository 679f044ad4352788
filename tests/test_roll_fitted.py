"""Pipelines that were made to fit, or to hurry: offloaded, in fewer bits, with other attention, with step caches."""

import accelerate
import diffusers
import pytest
import torch
from diffusers import (
    FasterCacheConfig,
    FirstBlockCacheConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
)
from diffusers.hooks import apply_first_block_cache
from diffusers.models.attention_dispatch import attention_backend
from tiny_families import CPU, ROLL, TEXT_TO_IMAGE, WITH_CONTROL, apart, draw, make

from rolling_diffusion import roll

# Offloading: a device to compute on stands in for the GPU; the hooks are those of a GPU.


def offload_in_groups(pipe, kind):
    blocks = {"num_blocks_per_group": 1} if kind == "block_level" else {}
    pipe.enable_group_offload(onload_device=CPU, offload_device=CPU, offload_type=kind, **blocks)


def offload_models(pipe):
    _, first = accelerate.cpu_offload_with_hook(pipe.transformer, CPU)
    _, second = accelerate.cpu_offload_with_hook(pipe.vae, CPU, prev_module_hook=first)
    pipe._all_hooks, pipe._offload_device = [first, second], CPU


def offload_layers(pipe):
    for model in pipe.components.values():
        if isinstance(model, torch.nn.Module):
            accelerate.cpu_offload(model, CPU, offload_buffers=True)


OFFLOADS = {
    "blocks in groups": lambda pipe: offload_in_groups(pipe, "block_level"),
    "leaves in groups": lambda pipe: offload_in_groups(pipe, "leaf_level"),
    "models": offload_models,
    "layers": offload_layers,
}


@pytest.mark.parametrize("way", OFFLOADS)
@pytest.mark.parametrize("name", WITH_CONTROL)
def test_offloaded_pipelines_draw_the_same(name, way):
    pipe, arguments = make(name)
    expected, stock = draw(roll(pipe), arguments, **ROLL), draw(pipe, arguments)
    OFFLOADS[way](pipe)
    assert torch.equal(draw(roll(pipe), arguments, **ROLL), expected)
    assert torch.equal(draw(roll(pipe), arguments, lag=0), stock)
    assert torch.equal(draw(pipe, arguments), stock)
    if way == "layers":
        assert pipe.transformer.device == torch.device("meta")  # so its weights were fetched, and put away


# Fewer bits.


def distance(found, expected):
    """Relative to what is expected; not 0, or nothing was changed."""
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("name", TEXT_TO_IMAGE)
@pytest.mark.parametrize(("bits", "most"), [("Int8WeightOnlyConfig", 0.03), ("Float8WeightOnlyConfig", 0.1)])
def test_models_quantised_by_torchao_roll(name, bits, most):
    quantization = pytest.importorskip("torchao.quantization")
    pipe, arguments = make(name)
    expected = draw(roll(pipe), arguments, **ROLL)
    quantization.quantize_(pipe.transformer, getattr(quantization, bits)())
    assert 0 < distance(draw(roll(pipe), arguments, **ROLL), expected) < most
    assert torch.equal(draw(roll(pipe), arguments, lag=0), draw(pipe, arguments))


def test_gguf_files_roll(tmp_path):
    gguf = pytest.importorskip("gguf")
    pipe, arguments = make("FluxPipeline")
    expected = draw(roll(pipe), arguments, **ROLL)
    pipe.transformer.save_config(tmp_path)
    writer = gguf.GGUFWriter(tmp_path / "tiny.gguf", "flux")
    for name, weight in pipe.transformer.state_dict().items():
        whole = weight.ndim == 2 and weight.shape[1] % 32 == 0  # rows consist of whole blocks of 32
        kind = gguf.GGMLQuantizationType.Q8_0 if whole else gguf.GGMLQuantizationType.F32
        writer.add_tensor(name, gguf.quants.quantize(weight.numpy(), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    config = diffusers.GGUFQuantizationConfig(compute_dtype=torch.float32)
    pipe.transformer = type(pipe.transformer).from_single_file(
        str(tmp_path / "tiny.gguf"), config=str(tmp_path), quantization_config=config
    )
    assert 0 < distance(draw(roll(pipe), arguments, **ROLL), expected) < 0.05
    assert torch.equal(draw(roll(pipe), arguments, lag=0), draw(pipe, arguments))


@pytest.mark.parametrize("name", WITH_CONTROL)
def test_weights_stored_in_8_bits_and_cast_for_each_layer_roll(name):
    pipe, arguments = make(name)
    expected = draw(roll(pipe), arguments, **ROLL)
    pipe.transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    assert 0 < distance(draw(roll(pipe), arguments, **ROLL), expected) < 0.1
    assert torch.equal(draw(roll(pipe), arguments, lag=0), draw(pipe, arguments))


# How attention is computed.


@pytest.mark.parametrize("persistence", [1.0, 0.7])
@pytest.mark.parametrize("name", TEXT_TO_IMAGE)
def test_attention_backends(name, persistence):
    """flex takes no additive mask as it is: what weighs memory is computed by the native one."""
    pipe, arguments = make(name)
    rolled, options = roll(pipe), {**ROLL, "attention_persistence": persistence}
    expected = draw(rolled, arguments, **options)
    for backend in ("native", "_native_math", "flex", "native"):  # the last is every later model's, too
        pipe.transformer.set_attention_backend(backend)
        assert apart(draw(rolled, arguments, **options), expected) < 1e-5, backend
    pipe.transformer.reset_attention_backend()
    with attention_backend("_native_math"):
        assert apart(draw(rolled, arguments, **options), expected) < 1e-5


@pytest.mark.parametrize("name", ["FluxPipeline", "Flux2Pipeline"])
def test_projections_fused_into_one_roll(name):
    pipe, arguments = make(name)
    expected = draw(roll(pipe), arguments, **ROLL)
    pipe.transformer.fuse_qkv_projections()
    assert any(hasattr(block.attn, "to_qkv") for block in pipe.transformer.transformer_blocks)
    assert apart(draw(roll(pipe), arguments, **ROLL), expected) < 1e-5
    assert torch.equal(draw(roll(pipe), arguments, lag=0), draw(pipe, arguments))


CACHES = {
    "first block": FirstBlockCacheConfig(threshold=0.2),
    "TaylorSeer": TaylorSeerCacheConfig(cache_interval=2, disable_cache_before_step=1),
    "MagCache": MagCacheConfig(num_inference_steps=4, mag_ratios=torch.ones(4)),
    "pyramid": PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, spatial_attention_timestep_skip_range=(-1, 901)
    ),
    "FasterCache": FasterCacheConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(-1, 901),
        unconditional_batch_skip_range=2,
        attention_weight_callback=lambda module: 0.5,
        is_guidance_distilled=True,
    ),
}


@pytest.mark.parametrize("cache", CACHES)
def test_step_caches_are_refused_when_rolling_and_work_at_lag_0(cache):
    pipe, arguments = make("FluxPipeline")
    expected = draw(roll(pipe), arguments, **ROLL)
    config = CACHES[cache]
    if hasattr(config, "current_timestep_callback"):  # it asks the user's own pipeline, in the midst of a call
        config.current_timestep_callback = lambda: pipe.current_timestep
    pipe.transformer.enable_cache(config)
    cached = draw(pipe, arguments)
    del vars(pipe)["_current_timestep"]
    assert torch.equal(draw(roll(pipe), arguments, lag=0), cached)
    with pytest.raises(ValueError, match="a step cache is enabled on the transformer") as caught:
        draw(roll(pipe), arguments, **ROLL)
    assert "\n" not in str(caught.value)
    pipe.transformer.disable_cache()
    assert torch.equal(draw(roll(pipe), arguments, **ROLL), expected)


def test_step_caches_set_past_the_model_are_found_too():
    pipe, arguments = make("FluxPipeline")
    apply_first_block_cache(pipe.transformer, FirstBlockCacheConfig(threshold=0.2))
    assert not pipe.transformer.is_cache_enabled
    with pytest.raises(ValueError, match="a step cache is enabled on the transformer"):
        draw(roll(pipe), arguments, **ROLL)
