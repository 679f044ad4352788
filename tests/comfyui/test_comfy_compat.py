"""What other nodes put on a Flux: each works, or refuses with a sentence."""

import pytest
import torch

RUN = {"window": 8, "overlap": 4}


@pytest.fixture(scope="module")
def flux(host):
    return host.tiny.flux()


@pytest.fixture(scope="module")
def plain(host, flux):
    return host.ours(flux, host.tiny.latent(16, 8), **RUN)


def test_lora(host, flux, plain):
    """A weight patch changes the result, at one block exactly as in KSampler, and is gone without it."""
    latent = host.tiny.latent(16, 8)
    patched = flux.clone()
    weight = "diffusion_model.single_blocks.0.linear2.weight"
    shape = patched.get_model_object(weight).shape
    patched.add_patches({weight: ("diff", (torch.randn(shape) * 0.05,))}, 1.0)
    assert torch.equal(host.ours(patched, latent), host.stock(patched, latent))
    assert not torch.equal(host.ours(patched, latent, **RUN), plain)
    assert torch.equal(host.ours(flux, latent, **RUN), plain)


def test_block_replacements_are_composed(host, flux, plain):
    """A replacement that does nothing changes nothing; one that skips a block acts; both see the moving tokens."""
    latent, tokens = host.tiny.latent(16, 8), []

    def through(args, extra):
        tokens.append(args["img"].shape[1])
        return extra["original_block"](args)

    same = flux.clone()
    same.set_model_patch_replace(through, "dit", "double_block", 0)
    same.set_model_patch_replace(through, "dit", "single_block", 1)
    assert torch.equal(host.ours(same, latent, **RUN), plain)
    assert min(tokens) < 8 * 4  # fewer than the canvas
    skips = flux.clone()
    skips.set_model_patch_replace(lambda args, extra: {"img": args["img"]}, "dit", "single_block", 1)
    assert not torch.equal(host.ours(skips, latent, **RUN), plain)
    assert torch.equal(host.ours(skips, latent), host.stock(skips, latent))


def test_attention_overrides_are_chained(host, flux, plain):
    """As sage and flash attention nodes do it: the override sees keys with memory behind them."""
    seen = []

    def override(func, q, k, v, heads, **kwargs):
        seen.append(k.shape[2] - q.shape[2])
        return func(q, k, v, heads, **kwargs)

    model = flux.clone()
    model.model_options["transformer_options"]["optimized_attention_override"] = override
    assert torch.equal(host.ours(model, host.tiny.latent(16, 8), **RUN), plain)
    assert min(seen) == 0 and max(seen) > 0


def test_model_function_wrapper_sees_the_canvas(host, flux, plain):
    model, seen = host.calls(flux)
    assert torch.equal(host.ours(model, host.tiny.latent(16, 8), **RUN), plain)
    assert {call[:2] for call in seen} == {(16, 8)}


def test_every_kind_of_wrapper_passes(host, flux, plain):
    """Wrappers of other nodes at each level, which pass everything on."""
    from comfy.patcher_extension import WrappersMP

    model, names = flux.clone(), []
    for kind in (
        "OUTER_SAMPLE",
        "SAMPLER_SAMPLE",
        "PREDICT_NOISE",
        "CALC_COND_BATCH",
        "APPLY_MODEL",
        "DIFFUSION_MODEL",
    ):

        def wrapper(executor, *args, kind=kind, **kwargs):
            names.append(kind)
            return executor(*args, **kwargs)

        model.add_wrapper_with_key(getattr(WrappersMP, kind), "test", wrapper)
    assert torch.equal(host.ours(model, host.tiny.latent(16, 8), **RUN), plain)
    assert len(set(names)) == 6


def test_post_input_patches_see_all_tokens(host, flux, plain):
    model, seen = flux.clone(), []

    def patch(args):
        seen.append(args["img"].shape[1])
        return args

    model.set_model_patch(patch, "post_input")
    assert torch.equal(host.ours(model, host.tiny.latent(16, 8), **RUN), plain)
    assert set(seen) == {8 * 4}


@pytest.mark.parametrize("method", ["offset", "index", "uxo"])
def test_reference_latents(host, flux, plain, method):
    """Kontext: the reference is seen whole by every block; at one block as in KSampler."""
    reference = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(2))
    options = {"reference_latents": [reference], "reference_latents_method": method}
    prompts = host.tiny.conditioning(1, **options), host.tiny.conditioning(2, **options)
    latent = host.tiny.latent(16, 8)
    assert torch.equal(host.ours(flux, latent, prompts=prompts), host.stock(flux, latent, prompts=prompts))
    out = host.ours(flux, latent, prompts=prompts, **RUN)
    assert out.isfinite().all() and not torch.equal(out, plain)


def test_references_told_noise_level_0(host):
    """Flux 2's index_timestep_zero: the reference keeps level 0 while the blocks roll."""
    import comfy.supported_models

    if not hasattr(comfy.supported_models, "Flux2"):
        pytest.skip("this ComfyUI has no Flux 2")
    model = host.tiny.flux2()
    reference = torch.randn(1, 128, 4, 4, generator=torch.Generator().manual_seed(2))
    outs = []
    for method in ("index_timestep_zero", "index"):
        options = {"reference_latents": [reference], "reference_latents_method": method}
        prompts = host.tiny.conditioning(1, **options), host.tiny.conditioning(2, **options)
        latent = host.tiny.latent(8, 4, 128)
        assert torch.equal(host.ours(model, latent, prompts=prompts), host.stock(model, latent, prompts=prompts))
        outs.append(host.ours(model, latent, prompts=prompts, window=4, overlap=2))
    assert all(out.isfinite().all() for out in outs) and not torch.equal(*outs)


def test_inpaint_models_get_their_latents(host):
    """Flux Fill: image and mask are concatenated to the latent; the moving tokens get their own."""
    model = host.tiny.flux(in_channels=16 + 16 + 64)
    image = torch.randn(1, 16, 16, 8, generator=torch.Generator().manual_seed(3))
    mask = torch.zeros(1, 1, 128, 64)
    mask[:, :, 64:] = 1
    options = {"concat_latent_image": image, "concat_mask": mask}
    prompts = host.tiny.conditioning(1, **options), host.tiny.conditioning(2, **options)
    latent = host.tiny.latent(16, 8)
    assert torch.equal(host.ours(model, latent, prompts=prompts), host.stock(model, latent, prompts=prompts))
    out = host.ours(model, latent, prompts=prompts, **RUN)
    other = [host.tiny.conditioning(i, **{**options, "concat_latent_image": -image}) for i in (1, 2)]
    assert out.isfinite().all() and not torch.equal(out, host.ours(model, latent, prompts=other, **RUN))


def test_area_conditioning_acts_in_its_area(host, flux):
    """Full steps of one call: a prompt on the right changes nothing on the left, where only the other is."""
    latent = host.tiny.latent(16, 16)
    left = host.tiny.conditioning(1, area=(16, 8, 0, 0), strength=1.0)
    right = [host.tiny.conditioning(i, area=(16, 8, 0, 8), strength=1.0) for i in (3, 4)]
    outs = [host.ours(flux, latent, prompts=(left + r, host.prompts[1]), **RUN, cfg=1.0) for r in right]
    assert torch.equal(outs[0][..., :8], outs[1][..., :8])
    assert not torch.equal(outs[0][..., 8:], outs[1][..., 8:])
    odd = host.tiny.conditioning(1, area=(9, 7, 3, 5), strength=1.0)  # snapped to tokens
    assert host.ours(flux, latent, prompts=(host.prompts[0] + odd, host.prompts[1]), **RUN).isfinite().all()


def test_mask_conditioning_acts_in_its_mask(host, flux):
    latent = host.tiny.latent(16, 16)
    mask = torch.zeros(1, 16, 16)
    mask[..., 8:] = 1
    first = host.tiny.conditioning(1, mask=1 - mask, mask_strength=1.0)
    seconds = [host.tiny.conditioning(i, mask=mask, mask_strength=1.0) for i in (3, 4)]
    outs = [host.ours(flux, latent, steps=1, prompts=(first + s, host.prompts[1]), cfg=1.0) for s in seconds]
    assert torch.equal(outs[0][..., :8], outs[1][..., :8])
    rolled = [host.ours(flux, latent, prompts=(first + s, host.prompts[1]), cfg=1.0, **RUN) for s in seconds]
    assert all(o.isfinite().all() for o in rolled) and not torch.equal(*rolled)


def test_controlnet_residuals_go_to_their_tokens(host, flux):
    """A Flux ControlNet answers for the canvas; the moving tokens get theirs: at one noise level, exactly stock's."""
    import comfy.controlnet

    class Positions(comfy.controlnet.ControlBase):
        """Adds to each token a pattern of its own place."""

        def get_control(self, x, t, cond, count, options):
            tokens = (x.shape[-2] // 2) * (x.shape[-1] // 2)
            pattern = torch.linspace(-1, 1, tokens)[None, :, None].expand(x.shape[0], -1, 256)
            return {"input": [pattern.clone()], "output": [None, pattern.clone()]}

        def copy(self):
            return Positions()

    prompts = [[[c[0][0], {**c[0][1], "control": Positions()}]] for c in host.prompts]
    latent = host.tiny.latent(16, 8)
    assert torch.equal(host.ours(flux, latent, prompts=prompts), host.stock(flux, latent, prompts=prompts))
    out = host.ours(flux, latent, prompts=prompts, **RUN)
    assert out.isfinite().all() and not torch.equal(out, host.ours(flux, latent, **RUN))
    pick = host.module("flux_call").FluxCall._pick
    call = type("Call", (), {"index": torch.tensor([5, 2])})()
    pattern = torch.arange(8.0)[None, :, None]
    assert pick(call, pattern, 8).flatten().tolist() == [5, 2] and pick(call, None, 8) is None
    assert pick(call, pattern[:, :4], 8).flatten().tolist() == [0, 2]  # a residual for the first tokens alone


def test_prompt_schedules(host, flux):
    """A prompt for the first half of the steps and one for the second: each block changes over on its own."""
    early = host.tiny.conditioning(1, start_percent=0.0, end_percent=0.5)
    late = host.tiny.conditioning(3, start_percent=0.5, end_percent=1.0)
    prompts = early + late, host.prompts[1]
    latent = host.tiny.latent(16, 8)
    assert torch.equal(host.ours(flux, latent, prompts=prompts), host.stock(flux, latent, prompts=prompts))
    assert host.ours(flux, latent, prompts=prompts, **RUN).isfinite().all()


def test_weights_in_bf16(host):
    model = host.tiny.flux(dtype=torch.bfloat16)
    latent = host.tiny.latent(16, 8)
    assert torch.equal(host.ours(model, latent), host.stock(model, latent))
    assert host.ours(model, latent, **RUN).isfinite().all()


def test_two_nodes_in_one_graph_do_not_meet(host, flux, plain):
    """The second node's model is the first one's, its latent the first one's result."""
    latent = host.tiny.latent(16, 8)
    first = host.ours(flux, latent, **RUN)
    second = host.ours(flux, {"samples": first}, denoise=0.5, order="spiral-out", **RUN)
    assert torch.equal(first, plain)
    assert torch.equal(host.ours(flux, {"samples": first}, denoise=0.5, order="spiral-out", **RUN), second)


def test_adaptive_samplers_are_refused_by_name(host, flux):
    with pytest.raises(ValueError, match=r"dpm_adaptive chooses its own noise levels.*euler"):
        host.ours(flux, host.tiny.latent(8, 8), sampler="dpm_adaptive")
    sampler = host.run("KSamplerSelect", sampler_name="dpm_adaptive")[0]
    rolling = host.run("RollingSampler", sampler=sampler, autoregressive_order="raster", rolling_window_size=64,
                       rolling_overlap=16, attention_persistence=0.5)[0]  # fmt: skip
    with pytest.raises(ValueError, match="dpm_adaptive"):
        rolling.sample(None, None, {}, None, None)


@pytest.mark.parametrize("kind", ["flux", "sd"])
def test_compiled_models_roll_uncompiled(host, kind, caplog):
    """torch.compile's graphs don't look at a call's options again; so they are left out, and the node says so."""
    model = getattr(host.tiny, kind)()
    latent = host.tiny.latent(16, 8, model.model.latent_format.latent_channels)
    compiled = host.run("TorchCompileModel", model=model, backend="inductor")[0]
    with caplog.at_level("INFO", logger="rolling_diffusion"):
        assert torch.equal(host.ours(compiled, latent, **RUN), host.ours(model, latent, **RUN))
    assert "runs uncompiled while blocks roll" in caplog.text
    assert "torch.compile" in compiled.wrappers["apply_model"]  # the user's model keeps it


def test_one_block_stays_compiled(host, flux):
    """With a backend that compiles at once; ComfyUI's guards are taken off as its own node does it."""
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    model, latent, graphs = flux.clone(), host.tiny.latent(8, 8), []

    def backend(graph, inputs, **kwargs):
        graphs.append(graph)
        return graph.forward

    set_torch_compile_wrapper(model=model, backend=backend)
    torch._dynamo.reset()
    out, stock = host.ours(model, latent), host.stock(flux, latent)
    assert graphs and (out - stock).abs().mean() < 1e-5 * stock.abs().mean()


def without(function, parameter):
    """The function as another release might have it: this parameter is not known, and refused."""
    import functools
    import inspect

    signature = inspect.signature(function)

    @functools.wraps(function)
    def changed(*args, **kwargs):
        if parameter in kwargs:
            raise TypeError(f"unexpected keyword argument {parameter!r}")
        return function(*args, **kwargs)

    left = [p for p in signature.parameters.values() if p.name != parameter]
    changed.__signature__ = signature.replace(parameters=left)
    return changed


CHANGES = [
    ("comfy.ldm.flux.layers", "DoubleStreamBlock", "forward", "modulation_dims_img"),
    ("comfy.ldm.flux.layers", "SingleStreamBlock", "forward", "modulation_dims"),
    ("comfy.ldm.flux.layers", "LastLayer", "forward", "modulation_dims"),
]


@pytest.mark.parametrize("module, owner, name, parameter", CHANGES)
def test_a_changed_host_gets_windows_and_a_sentence(host, flux, caplog, monkeypatch, module, owner, name, parameter):
    """Signatures that are not what the hooks call: no traceback, but windows."""
    import importlib

    owner = getattr(importlib.import_module(module), owner)
    monkeypatch.setattr(owner, name, without(getattr(owner, name), parameter))
    with caplog.at_level("INFO", logger="rolling_diffusion"):
        assert host.ours(flux, host.tiny.latent(16, 8), **RUN).isfinite().all()
    assert f"This ComfyUI has changed {parameter} of" in caplog.text and "windows" in caplog.text


def test_everything_that_is_relied_on_is_looked_up(host, flux, monkeypatch):
    """Each entry in turn: a name that is not there, a word that is not looked for."""
    module, model = host.module("drift"), flux.model.diffusion_model
    assert module.drift(model) == ""
    for name, (find, parameters) in module.CALLED.items():
        monkeypatch.setitem(module.CALLED, name, (find, (*parameters, "never")))
        assert module.drift(model) == f"never of {name}"
        monkeypatch.setitem(module.CALLED, name, (find, parameters))
    for name, (find, word) in module.LOOKED_FOR.items():
        monkeypatch.setitem(module.LOOKED_FOR, name, (find, '"never looked for"'))
        assert module.drift(model) == name
        monkeypatch.setitem(module.LOOKED_FOR, name, (find, word))
    monkeypatch.setattr(module, "HAS", (*module.HAS, "never"))
    assert module.drift(model) == "Flux.never"
