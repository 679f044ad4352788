"""What the nodes promise beside sampling: what they say, their sizes on every model, errors, and the advanced one."""

import pytest
import torch


@pytest.fixture(scope="module")
def flux(host):
    return host.tiny.flux()


def test_one_block_is_said_with_the_size_below_which_it_rolls(host, flux, caplog):
    with caplog.at_level("INFO", logger="rolling_diffusion"):
        host.ours(flux, host.tiny.latent(16, 8))
        assert "One block" in caplog.text and "rolling_window_size below 16" in caplog.text
        assert caplog.text.count("Rolling:") == 1
        caplog.clear()
        host.ours(flux, host.tiny.latent(16, 8), window=8, overlap=4)
        assert caplog.text == ""


def test_windows_and_overlaps_are_the_same_part_of_the_picture_on_every_model(host, caplog):
    """Cells of 16×16 pixels: a window of 32 cells of 8×8 is 16 of them. The node says so."""
    model = host.tiny.sd()
    settings = host.module("settings").Settings(window=32, overlap=8, lookahead=16)
    cases = ((8, 2, (32, 8, 16)), (16, 1, (16, 4, 8)), (32, 1, (8, 2, 4)), (1, 16, (256, 64, 128)), (42, 1, (6, 2, 3)))
    for pixels, multiple, expected in cases:
        plan = settings.plan(512, 512, 4, multiple, pixels)
        assert (plan.window, plan.overlap, plan.lookahead) == expected, pixels
    assert host.module("settings").cell_pixels(model.model) == 8
    model.model.latent_format.spacial_downscale_ratio = 16
    with caplog.at_level("INFO", logger="rolling_diffusion"):
        host.ours(model, host.tiny.latent(16, 4, 4), window=16, overlap=8, steps=2)
    assert (
        "A cell of this model is 16×16 pixels: the window of 16 cells of 8×8 is 8 of them, the overlap 4."
        in caplog.text
    )


@pytest.mark.parametrize("name", ["LTXV", "HunyuanImage21", "SC_Prior", "SC_B", "ChromaRadiance", "Flux", "SDXL"])
def test_the_pixels_of_a_cell_are_known(host, name):
    """What newer ComfyUIs say of their latent formats, older ones are told."""
    import types

    import comfy.latent_formats

    latent_format = getattr(comfy.latent_formats, name)
    module = host.module("settings")
    expected = module.PIXELS.get(name, 8)
    assert module.cell_pixels(types.SimpleNamespace(latent_format=latent_format())) == expected


def test_step_caches_and_guidance_that_measures_the_canvas_are_doubted(host, flux, caplog):
    """EasyCache, LazyCache and RescaleCFG, as their own nodes put them on; nothing is said at one block."""
    latent = host.tiny.latent(16, 8)
    rescaled = host.run("RescaleCFG", model=flux, multiplier=0.7)[0]
    cache = {"model": flux, "reuse_threshold": 0.2, "start_percent": 0.15, "end_percent": 0.95, "verbose": False}
    lazy, easy = (host.run(name, **cache)[0] for name in ("LazyCache", "EasyCache"))
    for model, words in ((rescaled, "measures the whole canvas"), (lazy, "step cache"), (easy, "step cache")):
        with caplog.at_level("WARNING", logger="rolling_diffusion"):
            caplog.clear()
            host.ours(model, latent)
            assert caplog.text == ""
            host.ours(model, latent, window=8, overlap=4)
            assert words in caplog.text


def test_references_in_windows_are_doubted(host, caplog):
    reference = torch.randn(1, 4, 8, 8)
    prompts = [host.tiny.conditioning(i, reference_latents=[reference]) for i in (1, 2)]
    with caplog.at_level("WARNING", logger="rolling_diffusion"):
        host.ours(host.tiny.sd(), host.tiny.latent(16, 8, 4), prompts=prompts, window=8, overlap=4, steps=2)
    assert "Each window sees the whole reference" in caplog.text


def advanced(host, name, model, latent, **values):
    run = {"add_noise": "enable", "noise_seed": 5, "steps": 6, "cfg": 3.0, "sampler_name": "euler",
           "scheduler": "simple", "start_at_step": 0, "end_at_step": 10000, "return_with_leftover_noise": "disable",
           "positive": host.prompts[0], "negative": host.prompts[1]}  # fmt: skip
    if name != "KSamplerAdvanced":
        run.update(autoregressive_order="top-to-bottom", rolling_window_size=64, rolling_overlap=16,
                   attention_persistence=0.5)  # fmt: skip
    return getattr(host.nodes[name](), "sample")(model=model, latent_image=latent, **{**run, **values})[0]  # noqa: B009


OURS = "AutoregressiveRollingDiffusionSamplerAdvanced"
CASES = [
    {},
    {"end_at_step": 4, "return_with_leftover_noise": "enable"},
    {"end_at_step": 4},
    {"start_at_step": 2, "add_noise": "disable"},
    {"start_at_step": 2},
    {"start_at_step": 6},
    {"start_at_step": 9, "add_noise": "disable"},
    {"end_at_step": 0},
    {"end_at_step": 0, "return_with_leftover_noise": "enable"},
    {"start_at_step": 3, "end_at_step": 3},
]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", ["flux", "sd"])
def test_one_block_is_ksampler_advanced(host, kind, case):
    model = getattr(host.tiny, kind)()
    latent = host.tiny.latent(8, 8, model.model.latent_format.latent_channels, seed=4)
    for sampler in ("euler", "dpmpp_2m_sde", "euler_ancestral"):
        expected = advanced(host, "KSamplerAdvanced", model, latent, sampler_name=sampler, **case)["samples"]
        assert torch.equal(advanced(host, OURS, model, latent, sampler_name=sampler, **case)["samples"], expected)


def test_base_and_refiner_in_a_row(host):
    """As SDXL's templates have them: the base leaves noise over, the refiner goes on without adding any."""
    base, refiner = host.tiny.sd(1), host.tiny.sd(2)
    out = []
    for name, window in (
        ("KSamplerAdvanced", {}),
        (OURS, {}),
        (OURS, {"rolling_window_size": 8, "rolling_overlap": 4}),
    ):
        latent = host.tiny.latent(16, 8, 4)
        first = advanced(host, name, base, latent, end_at_step=4, return_with_leftover_noise="enable", **window)
        second = advanced(host, name, refiner, first, start_at_step=4, add_noise="disable", **window)
        out.append((first["samples"], second["samples"]))
    assert torch.equal(out[0][0], out[1][0]) and torch.equal(out[0][1], out[1][1])
    assert out[2][1].isfinite().all() and not torch.equal(out[2][1], out[1][1])


def test_values_that_do_not_fit_are_refused_before_anything_is_evaluated(host):
    """As ComfyUI asks it: what is linked comes as None, and is named if it is needed."""
    node = host.nodes["AutoregressiveRollingDiffusionSampler"]()
    values = {
        "model": None,
        "positive": None,
        "steps": 20,
        "rolling_window_size": 32,
        "rolling_overlap": 16,
        "draft": 5,
    }
    assert node.check_lazy_status(**values) == ["model", "positive"]
    with pytest.raises(ValueError, match="rolling_overlap is 32, and must be below rolling_window_size, which is 32"):
        node.check_lazy_status(**{**values, "rolling_overlap": 32})
    with pytest.raises(ValueError, match="draft is 20, and must be below steps"):
        node.check_lazy_status(**{**values, "draft": 20})
    with pytest.raises(ValueError, match="below the 4 steps that are taken from 2 on"):
        node.check_lazy_status(**{**values, "start_at_step": 2, "end_at_step": 6})


def test_the_plan_preview_shows_what_this_model_gets(host, flux):
    values = {"width": 128, "height": 256, "steps": 8, "autoregressive_order": "top-to-bottom",
              "rolling_window_size": 16, "rolling_overlap": 8, "attention_persistence": 0.5, "draft": 0}  # fmt: skip
    image, plain = host.run("RollingPlanPreview", **values)
    assert host.run("RollingPlanPreview", model=flux, **values)[1] == plain and "ticks" in plain
    xl = [host.tiny.conditioning(i, width=768 + 1280, pooled=1280) for i in (1, 2)]
    for make, prompts, height in ((host.tiny.sd, None, 32), (host.tiny.sdxl, xl, 37)):  # tokens of 2 and of 4 cells
        model, seen = host.calls(make())
        windows = host.run("RollingPlanPreview", model=model, **{**values, "height": 8 * height})[1]
        run = {"steps": 8, "cfg": 1.0, "window": 16, "overlap": 8, "draft": 0}
        host.ours(model, host.tiny.latent(height, 16, 4), prompts=prompts, **run)
        area = sum(rows * columns for rows, columns, _ in seen)
        assert f"0 of the whole canvas + {len(seen)} of windows" in windows
        assert f"{area} cells, {area / (8 * height * 16):.2f} of ordinary sampling" in windows
    assert "takes one noise level a call, so it runs in windows" in windows
    assert "One block" in host.run("RollingPlanPreview", **{**values, "rolling_window_size": 64})[1]
    assert image.shape[0] == 1 and image.shape[-1] == 3


def test_previews_of_the_embedded_model_have_its_own_colours(host):
    """ComfyUI's own previewer on a latent, against the decoded picture, block by block."""
    import latent_preview
    import numpy

    model, _, vae = host.run("LoadEmbeddedRollingModel")
    rows = torch.linspace(0, 1, 64)[:, None].expand(64, 64)
    pixels = torch.stack([rows, rows.T, 1 - rows], -1)[None]
    latent = model.model.latent_format.process_in(vae.encode(pixels))
    previewer = latent_preview.get_previewer(torch.device("cpu"), model.model.latent_format)
    preview = numpy.asarray(previewer.decode_latent_to_preview(latent).convert("RGB"), dtype=float)[..., :3] / 255
    colours = pixels[0].unflatten(0, (8, 8)).unflatten(2, (8, 8)).mean((1, 3)).numpy()
    assert preview.shape == colours.shape and numpy.abs(preview - colours).mean() < 0.03
