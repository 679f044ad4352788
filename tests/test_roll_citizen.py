"""What users combine with a pipeline goes on working when it rolls, or is refused in one sentence."""

import contextlib
import functools
import io

import diffusers
import pytest
import torch
from diffusers.loaders import lora_conversion_utils
from diffusers.models.attention_processor import SD3IPAdapterJointAttnProcessor2_0
from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from tiny_families import FLUX, ROLL, TEXT_TO_IMAGE, apart, draw, flux_parts, make, noisy, normal, picture

from rolling_diffusion import roll

# LoRA.

TARGETS = {
    "FluxPipeline": [
        "to_q",
        "to_k",
        "to_v",
        "norm1.linear",
        "norm.linear",
        "norm_out.linear",
        "proj_mlp",
        "x_embedder",
    ],
    "Flux2Pipeline": ["to_q", "to_qkv_mlp_proj", "double_stream_modulation_img.linear", "timestep_embedder.linear_1"],
    "Flux2KleinPipeline": ["to_q", "to_qkv_mlp_proj", "single_stream_modulation.linear"],
    "StableDiffusion3Pipeline": ["to_q", "add_k_proj", "norm1.linear", "norm_out.linear", "timestep_embedder.linear_1"],
}


def lora(pipe, targets):
    """Random weights of a LoRA, under diffusers' own names."""
    model = type(pipe.transformer).from_config(pipe.transformer.config)
    model.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=targets))
    torch.manual_seed(5)
    weights = get_peft_model_state_dict(model)
    return {f"transformer.{name}": 0.3 * torch.randn_like(weight) for name, weight in weights.items()}


@pytest.mark.parametrize("name", TARGETS)
def test_loras_load_scale_switch_fuse_and_unload(name):
    pipe, arguments = make(name)
    rolled = roll(pipe)
    plain = draw(rolled, arguments, **ROLL)
    pipe.load_lora_weights(lora(pipe, TARGETS[name]), adapter_name="style")
    strong = draw(rolled, arguments, **ROLL)
    assert apart(strong, plain) > 0.05
    assert torch.equal(draw(rolled, arguments, lag=0), draw(pipe, arguments))
    option = "joint_attention_kwargs" if "joint_attention_kwargs" in rolled.parameters else "attention_kwargs"
    half = draw(rolled, arguments, **ROLL, **{option: {"scale": 0.5}})
    assert apart(half, strong) > 0.05
    pipe.set_adapters(["style"], [0.5])
    assert apart(draw(rolled, arguments, **ROLL), half) < 1e-5
    pipe.set_adapters(["style"], [1.0])
    pipe.fuse_lora()
    assert apart(draw(rolled, arguments, **ROLL), strong) < 1e-5
    pipe.unfuse_lora()
    pipe.unload_lora_weights()
    assert apart(draw(rolled, arguments, **ROLL), plain) < 1e-5


# As other programs name a LoRA's matrices: the name, rows and columns; what they call the two factors.
WIDTH, DOWN_UP, A_B = 32, (".lora_down.weight", ".lora_up.weight"), (".lora_A.weight", ".lora_B.weight")
KOHYA = {"0_img_attn_qkv": 96, "1_txt_mlp_0": 128, "1_img_mod_lin": 192}
FORMATS = {
    "kohya": ("FluxPipeline", DOWN_UP, {f"lora_unet_double_blocks_{n}": r for n, r in KOHYA.items()}),
    "kohya, diffusers' names": ("FluxPipeline", DOWN_UP, {"lora_transformer_transformer_blocks_0_attn_to_q": 32}),
    "XLabs": ("FluxPipeline", (".down.weight", ".up.weight"), {"double_blocks.0.processor.qkv_lora1": 96}),
    "ai-toolkit": ("Flux2Pipeline", A_B, {"diffusion_model.double_blocks.0.img_attn.qkv": 96}),
    "kohya for FLUX.2": ("Flux2Pipeline", DOWN_UP, {"lora_unet_double_blocks_0_img_attn_qkv": 96}),
    "PEFT for FLUX.2": ("Flux2Pipeline", A_B, {"base_model.model.double_blocks.1.img_attn.qkv": 96}),
}


@pytest.mark.parametrize("kind", FORMATS)
def test_loras_of_other_programs(kind):
    if kind == "kohya for FLUX.2" and not hasattr(lora_conversion_utils, "_convert_kohya_flux2_lora_to_diffusers"):
        pytest.skip("diffusers reads these from 0.38 on")
    name, (down, up), rows = FORMATS[kind]
    pipe, arguments = make(name)
    rolled = roll(pipe)
    plain = draw(rolled, arguments, **ROLL)
    weights = {}
    for i, (matrix, n) in enumerate(rows.items()):
        weights |= {matrix + down: normal(2, WIDTH, seed=i), matrix + up: 0.5 * normal(n, 2, seed=i + 9)}
        weights |= {matrix + ".alpha": torch.tensor(2.0)} if kind.startswith("kohya") else {}
    pipe.load_lora_weights(weights)
    strong = draw(rolled, arguments, **ROLL)
    assert apart(strong, plain) > 0.01
    assert torch.equal(draw(rolled, arguments, lag=0), draw(pipe, arguments))
    pipe.fuse_lora()
    assert apart(draw(rolled, arguments, **ROLL), strong) < 1e-5


# IP-Adapters.


def adapt(pipe, adapters=1):
    """IP-Adapters with random weights, put in as loading them would."""
    model = pipe.transformer
    torch.manual_seed(3)
    for block in model.transformer_blocks:
        block.attn.set_processor(FluxIPAdapterAttnProcessor(WIDTH, WIDTH, [2] * adapters, scale=0.0))
    project = diffusers.models.embeddings.ImageProjection
    layers = [project(cross_attention_dim=WIDTH, image_embed_dim=20, num_image_text_embeds=2) for _ in range(adapters)]
    model.encoder_hid_proj = diffusers.models.embeddings.MultiIPAdapterImageProjection(layers).requires_grad_(False)
    model.requires_grad_(False)
    signs = ("ip_adapter_image_embeds", "negative_ip_adapter_image_embeds")
    return {sign: [normal(1, 1, 20, seed=i + 2 * j) for j in range(adapters)] for i, sign in enumerate(signs)}


@pytest.mark.parametrize("adapters", [1, 2])
def test_ip_adapters_act_by_their_scale(adapters):
    pipe, arguments = make("FluxPipeline")
    rolled = roll(pipe)
    plain = draw(rolled, arguments, **ROLL)
    more = adapt(pipe, adapters)
    assert apart(draw(rolled, arguments, **ROLL, **more), plain) < 1e-5
    pipe.set_ip_adapter_scale([3.0] * adapters if adapters > 1 else 3.0)
    assert apart(draw(rolled, arguments, **ROLL, **more), plain) > 0.05
    assert torch.equal(draw(rolled, arguments, lag=0, **more), draw(pipe, arguments, **more))
    # Memory keeps nothing of it: blocks without memory see the same adapter, and a plain processor none.
    for block in pipe.transformer.transformer_blocks:
        block.attn.set_processor(type(block.attn)._default_processor_cls())
    pipe.transformer.encoder_hid_proj = None
    assert torch.equal(draw(rolled, arguments, **ROLL), plain)


def test_attention_that_is_not_known_is_refused_when_it_rolls_and_not_at_lag_0():
    pipe, arguments = make("StableDiffusion3Pipeline")
    model = pipe.transformer
    one = SD3IPAdapterJointAttnProcessor2_0(hidden_size=32, ip_hidden_states_dim=32, head_dim=8, timesteps_emb_dim=32)
    expected = draw(pipe, arguments)
    model.transformer_blocks[1].attn.set_processor(one)
    with pytest.raises(
        ValueError, match="SD3IPAdapterJointAttnProcessor2_0 knows no memory: set JointAttnProcessor2_0"
    ):
        draw(roll(pipe), arguments, **ROLL)
    model.transformer_blocks[1].attn.set_processor(diffusers.models.attention_processor.JointAttnProcessor2_0())
    block = model.transformer_blocks[0]
    block.forward = functools.partial(type(block).forward, block)
    with pytest.raises(ValueError, match="the forward of JointTransformerBlock was replaced"):
        draw(roll(pipe), arguments, **ROLL)
    del block.forward
    assert torch.equal(draw(roll(pipe), arguments, lag=0), expected)


# ControlNets.


def net(seed=1, **settings):
    torch.manual_seed(seed)
    config = {name: value for name, value in FLUX.items() if name not in ("num_layers", "num_single_layers")}
    return noisy(diffusers.FluxControlNetModel(**config, num_layers=1, num_single_layers=1, **settings))


def controlled(nets):
    pipe = diffusers.FluxControlNetPipeline(**flux_parts(), controlnet=nets)
    pipe.set_progress_bar_config(disable=True)
    last = pipe.vae.encoder.conv_out  # pictures are encoded without noise, so alike
    last.weight.data[4:], last.bias.data[4:] = 0, -30
    return pipe


def test_several_controlnets_and_unions_add_up():
    _, arguments = make("FluxControlNetPipeline")
    arguments["latents"] = normal(1, 16 * 12, 16)
    two = {"control_image": [picture(), picture()], "controlnet_conditioning_scale": [0.3, 0.4]}
    strength = {"controlnet_conditioning_scale": 0.7}
    for kind, (nets, one, more, single) in {
        "several": ([net(), net()], net(), {}, {}),
        "unions": ([net(num_mode=2), net(num_mode=2)], net(num_mode=2), {"control_mode": [1, 1]}, {"control_mode": 1}),
    }.items():
        several = draw(roll(controlled(nets)), arguments, **ROLL, **two, **more)
        together = draw(roll(controlled(one)), arguments, **ROLL, **strength, **single)
        none = draw(roll(controlled(one)), arguments, **ROLL, controlnet_conditioning_scale=0.0, **single)
        assert apart(several, together) < 1e-5 and apart(several, none) > 0.05, kind
        stock = draw(controlled(nets), arguments, **two, **more)
        assert torch.equal(draw(roll(controlled(nets)), arguments, lag=0, **two, **more), stock), kind
    modes = [draw(roll(controlled(net(num_mode=2))), arguments, **ROLL, control_mode=mode) for mode in (0, 1)]
    assert apart(*modes) > 1e-3


def test_controlnets_for_a_part_of_the_steps_and_of_stable_diffusion_3_are_refused():
    pipe, arguments = make("FluxControlNetPipeline")
    with pytest.raises(ValueError, match=r"control_guidance_end is 0.5, and must be 1.0"):
        draw(roll(pipe), arguments, **ROLL, control_guidance_end=0.5)
    some = {"control_guidance_end": 0.5}
    assert torch.equal(draw(roll(pipe), arguments, lag=0, **some), draw(pipe, arguments, **some))
    stock, arguments = make("StableDiffusion3Pipeline")
    one = diffusers.SD3ControlNetModel.from_transformer(stock.transformer, 1, num_extra_conditioning_channels=0)
    pipe = diffusers.StableDiffusion3ControlNetPipeline(**stock.components, controlnet=one)
    with pytest.raises(ValueError, match="SD3ControlNetModel takes no noise level per token in a way that is known"):
        draw(roll(pipe), arguments, **ROLL, control_image=picture())


# The pipeline's own switches.


@pytest.mark.parametrize("name", TEXT_TO_IMAGE)
def test_vaes_in_tiles_and_slices(name):
    pipe, arguments = make(name)
    expected = draw(roll(pipe), arguments, **ROLL, output_type="pt")
    pipe.vae.enable_tiling()
    pipe.vae.enable_slicing()
    assert apart(draw(roll(pipe), arguments, **ROLL, output_type="pt"), expected) < 1e-5


@pytest.mark.parametrize("name", TEXT_TO_IMAGE)
def test_pipelines_with_parts_missing(name):
    """The text encoders are missing in all tests here; latents need no VAE either."""
    pipe, arguments = make(name)
    expected = draw(roll(pipe), arguments, **ROLL)
    pipe.vae = None
    assert torch.equal(draw(roll(pipe), arguments, **ROLL), expected)


def test_the_progress_bar_counts_ticks_as_the_pipeline_is_set():
    pipe, arguments = make("FluxPipeline")
    pipe.set_progress_bar_config(disable=False, desc="growing")
    shown, ticks = io.StringIO(), []
    with contextlib.redirect_stderr(shown):
        draw(roll(pipe), arguments, **ROLL, on_tick=ticks.append)
    assert "growing: 100%" in shown.getvalue() and f" {len(ticks)}/{len(ticks)} " in shown.getvalue() and len(ticks) > 4


@pytest.mark.parametrize("name", [n for n in TARGETS if n != "StableDiffusion3Pipeline"])
def test_pictures_of_one_prompt_are_each_what_their_own_generator_makes(name):
    pipe, arguments = make(name)
    rolled = roll(pipe)
    both = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    pictures = rolled(**{**arguments, "generator": both, "num_images_per_prompt": 2}, **ROLL).images
    for seed, found in zip((1, 2), pictures):
        assert apart(found, draw(rolled, arguments, seed=seed, **ROLL)[0]) < 1e-5


def test_the_gradient_mode_is_the_callers():
    pipe, arguments = make("FluxPipeline")
    with torch.enable_grad():
        assert not draw(roll(pipe), arguments, **ROLL).requires_grad
        assert torch.is_grad_enabled()
    with torch.inference_mode():
        draw(roll(pipe), arguments, **ROLL)
        assert torch.is_inference_mode_enabled()
