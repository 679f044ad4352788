"""The Flux-Dev node in this process, on the embedded model: guidance, memory, sizes, and what it says."""

import itertools

import pytest
import torch

NODE = "FluxDevAutoRegressiveRollingDiffusionSampler"
VALUES = {"prompt": "a red house", "negative_prompt": "", "width": 256, "height": 256, "seed": 3, "steps": 2,
          "cfg": 1.0, "autoregressive_order": "top-to-bottom", "rolling_window_size": 64, "rolling_overlap": 16,
          "attention_persistence": 0.5, "enable_cpu_offload": "True", "model": "embedded"}  # fmt: skip


def draw(host, **values):
    return host.nodes[NODE]().sample(**{**VALUES, **values})


def test_the_guidance_is_projected_and_bounded(host):
    """Against the paper's formula, written down anew; blocks at one level are joined, those that rest are left out."""
    guidance = host.module("guidance")
    x, p, n = (torch.randn(2, 3, 8, 4, generator=torch.Generator().manual_seed(i)) for i in range(3))
    top, middle, bottom = slice(0, 2), slice(2, 4), slice(4, 8)
    every = slice(0, 4)

    def expected(p, n):
        p, d = p.double(), (p - n).double()
        d = d * min(1.0, float(15 / 256 / d.square().mean().sqrt()))
        along = p / p.norm()
        return p + (5 - 1) * (d - (d * along).sum() * along)

    moving = [(0.7, [(top, every), (bottom, every)]), (0.4, [(middle, slice(0, 2))])]
    args = {"input": x, "cond_denoised": p, "uncond_denoised": n, "cond_scale": 5.0,
            "model_options": {host.module("canvas").MOVING: moving}}  # fmt: skip
    out = x - guidance.projected(args)
    for i in range(2):
        both = [torch.cat([t[i, :, top], t[i, :, bottom]], 1) for t in (p, n)]
        got = torch.cat([out[i, :, top], out[i, :, bottom]], 1)
        assert torch.allclose(got.double(), expected(*both), atol=1e-5)
        alone = [t[i, :, middle, :2] for t in (out, p, n)]
        assert torch.allclose(alone[0].double(), expected(*alone[1:]), atol=1e-5)
    assert torch.allclose(out[:, :, middle, 2:], p[:, :, middle, 2:], atol=1e-6)
    whole = x - guidance.projected({**args, "model_options": {}})
    assert torch.allclose(whole[0].double(), expected(p[0], n[0]), atol=1e-5)


def test_cfg_is_embedded_guidance_or_weighs_a_difference(host):
    """A distilled model: one branch without a negative prompt, two with one. An undistilled one: as KSampler."""
    guidance = host.module("guidance")
    positive, negative = host.prompts
    distilled, plain = host.tiny.flux(guidance=True), host.tiny.flux()
    for model, refuses, cfg, embedded in ((distilled, False, 1.0, 5.0), (distilled, True, 5.0, 3.5),
                                          (plain, False, 5.0, None), (plain, True, 5.0, None)):  # fmt: skip
        guider = guidance.make_guider(model, positive, negative, 5.0, refuses)
        assert guider.cfg == cfg
        assert {cond.get("guidance") for cond in guider.original_conds["positive"]} == {embedded}
        assert ("sampler_cfg_function" in guider.model_options) == (model is distilled and refuses)
    assert "sampler_cfg_function" not in distilled.model_options


def on_device(management):
    return [type(loaded.model.model).__name__ for loaded in management.current_loaded_models]


def test_enable_cpu_offload(host):
    """True: only the part at work is loaded, and other nodes' models stay. False: all three are. One picture."""
    import comfy.model_management as management

    management.unload_all_models()
    other = host.tiny.sd()
    management.load_models_gpu([other])
    node = host.nodes[NODE]()
    (first, _), loaded = node.sample(**VALUES), on_device(management)
    assert "Encoders" not in loaded and "FluxSchnell" not in loaded and "Flux" not in loaded
    assert any(each.model.is_clone(other) for each in management.current_loaded_models)
    (second, _), loaded = node.sample(**{**VALUES, "enable_cpu_offload": "False"}), on_device(management)
    assert {"Encoders", "Flux"} <= set(loaded) and len(loaded) == 4
    assert torch.equal(first["samples"], second["samples"])
    del node
    management.unload_all_models()


def test_the_defaults_roll_and_the_node_says_what_was_fitted(host, caplog):
    with caplog.at_level("INFO", logger="rolling_diffusion"):
        fitted = draw(host)[0]["samples"]
    assert "fitted to 16 cells, overlapping by 4" in caplog.text
    same = draw(host, rolling_window_size=16, rolling_overlap=4)[0]["samples"]
    assert torch.equal(fitted, same)
    assert not torch.equal(draw(host, fit_window=False)[0]["samples"], fitted)


@pytest.mark.parametrize("order, window", [("top-to-bottom", 16), ("left-to-right", 32), ("spiral-out", 32)])
def test_half_of_the_canvas_is_along_the_order(host, order, window):
    sampler = host.module("settings")
    settings = sampler.Settings(order).fitted(32, 64, host.module("notes").Notes())
    assert (settings.window, settings.overlap) == (window, window // 4)
    small = sampler.Settings(order, window=24)
    assert small.fitted(32, 64, host.module("notes").Notes()) is small


def test_sizes_go_as_far_as_the_model(host):
    """Any multiple of 16 up to ComfyUI's own limit; the picture has the size asked for."""
    import nodes

    spec = host.nodes[NODE].INPUT_TYPES()["required"]
    assert spec["width"][1]["max"] == spec["height"][1]["max"] == nodes.MAX_RESOLUTION
    for width, height in itertools.product((256, 304), repeat=2):
        latent, image = draw(host, width=width, height=height, steps=1)
        assert latent["samples"].shape == (1, 16, height // 8, width // 8)
        assert image.shape == (1, height, width, 3)


def test_the_schedule_is_that_of_the_models_makers(host):
    """FLUX.1-dev's shift for the size, as diffusers has it; beyond its largest size it stays."""
    flux_dev = host.module("flux_dev")
    model = host.tiny.flux(guidance=True)
    for size, mu in ((256, 0.5), (512, 0.63), (1024, 1.15), (4096, 1.15)):
        sampling = flux_dev._flux_schedule(model, size, size).get_model_object("model_sampling")
        assert sampling.shift == pytest.approx(mu, abs=1e-6)
    assert model.get_model_object("model_sampling").shift == 1.15  # the model itself is untouched
