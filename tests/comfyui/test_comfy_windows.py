"""Models with one noise level a call: windows, what fills them, and persistence."""

import itertools

import pytest
import torch


@pytest.fixture(scope="module")
def sd(host):
    return host.tiny.sd()


def boxes(host, blocks, shape, canvas, unit=1):
    return [host.module("windows").place(block, shape, canvas, unit) for block in blocks]


def test_a_window_is_the_plan_s_at_least(host, sd):
    """Eight strips of 8 rows with 8 of overlap: every call sees 16 rows or a little more, at one noise level."""
    model, seen = host.calls(sd)
    host.ours(model, host.tiny.latent(64, 8, 4), steps=2, window=16, overlap=8, draft=0, cfg=1.0)
    assert [call[:2] for call in seen] == [(20, 8)] * 8 * 2
    levels = [call[2] for call in seen]
    assert len(set(levels)) == 2 and levels[0] == max(levels)


def test_a_draft_is_the_whole_canvas(host, sd):
    model, seen = host.calls(sd)
    host.ours(model, host.tiny.latent(64, 8, 4), steps=4, window=16, overlap=8, draft=2, cfg=1.0)
    assert [call[0] for call in seen[:2]] == [64, 64] and len(seen) == 2 + 8 * 2
    assert {call[0] for call in seen[2:]} == {32}  # more than 16: half the canvas in each of 8 blocks is 2.5 in all


@pytest.mark.parametrize("order", ["top-to-bottom", "right-to-left", "spiral-out", "random"])
@pytest.mark.parametrize(("height", "width"), [(64, 64), (97, 33), (40, 131), (16, 16)])
def test_windows_hold_their_block_on_whole_tokens(host, order, height, width):
    windows, settings = host.module("windows"), host.module("settings")
    for window, overlap, draft in ((16, 8, -1), (13, 4, 0), (32, 4, 5)):
        plan = settings.Settings(order, window, overlap, draft=draft).plan(height, width, 8)
        for unit in (1, 2, 8):
            patched = type("Patched", (), {"patch_size": unit})()
            shape = windows.window_shape(plan, (height, width), patched)
            for block, box in zip(plan.blocks, boxes(host, plan.blocks, shape, (height, width), unit)):
                rows, columns, top, left = box
                assert top % unit == left % unit == 0
                assert top <= block.top and top + rows >= min(block.rows.stop, height)
                assert left <= block.left and left + columns >= min(block.columns.stop, width)
                assert min(top, left) >= 0 and top + rows <= height and left + columns <= width


def test_larger_windows_cost_no_more_than_the_budget(host, monkeypatch):
    windows, settings = host.module("windows"), host.module("settings")
    grown = 0
    for order in ("top-to-bottom", "left-to-right", "spiral-out"):
        for height, width, window, overlap in ((96, 32, 48, 16), (32, 64, 32, 16), (128, 128, 64, 16), (96, 96, 40, 8)):
            plan = settings.Settings(order, window, overlap).plan(height, width, 20)
            for kind, budget in (("Flux", windows.BUDGET), ("UNetModel", windows.UNPLACED)):
                monkeypatch.setattr(windows, "knows_places", lambda model: type(model).__name__ == "Flux")
                shape = windows.window_shape(plan, (height, width), type(kind, (), {})())
                cells = plan.draft * height * width + 10 * len(plan.blocks) * shape[0] * shape[1]
                if plan.window not in shape:
                    grown += 1
                    assert cells <= budget * 20 * height * width
    assert grown > 6


def test_the_first_block_is_drawn_as_ordinary_sampling_draws_it(host, sd):
    """A window that covers the canvas sees what KSampler's model sees, as long as no block came before."""
    latent = host.tiny.latent(32, 8, 4)
    ours = host.ours(sd, latent, steps=6, window=24, overlap=8, draft=3)
    stock = host.stock(sd, latent, steps=6)
    assert torch.allclose(ours[..., :16, :], stock[..., :16, :], atol=1e-4)
    assert not torch.allclose(ours[..., 16:, :], stock[..., 16:, :], atol=1e-4)  # the second saw the first one finished


def test_no_persistence_no_context_no_cost(host, sd):
    model, seen = host.calls(sd)
    host.ours(model, host.tiny.latent(24, 8, 4), steps=2, window=16, overlap=8, draft=0, persistence=0.0, cfg=1.0)
    assert {call[0] for call in seen} == {8}


def test_every_call_is_on_the_bar(host, sd, monkeypatch):
    """As many calls as were said beforehand."""
    ticks = []
    monkeypatch.setattr(host.module("sampler").log, "debug", lambda *args: None)
    bar = host.module("sampler").tqdm

    class Bar(bar):
        def close(self):
            ticks.append((self.n, self.total))
            super().close()

    monkeypatch.setattr(host.module("sampler"), "tqdm", Bar)
    for draft, order in ((2, "top-to-bottom"), (0, "spiral-out")):
        model, seen = host.calls(sd)
        host.ours(model, host.tiny.latent(24, 16, 4), steps=4, window=16, overlap=8, draft=draft, cfg=1.0, order=order)
        assert ticks[-1] == (len(seen), len(seen))


def test_persistence_pulls_towards_the_context(host, sd):
    """In self-attention the weight on context is p times what it is at p = 1, relative to the block's own."""
    windows = host.module("windows")
    q, k = (torch.randn(1, 128, 16, generator=torch.Generator().manual_seed(i)) for i in range(2))
    weights = torch.ones(16, 8)
    weights[:8] = 0.25
    denoiser = windows.WindowDenoiser.__new__(windows.WindowDenoiser)
    denoiser.context = 5
    bias = denoiser._bias(windows._grids(weights), q, k, {})
    plain = (q @ k.transpose(1, 2)).softmax(-1)
    weighed = (q @ k.transpose(1, 2) + bias).softmax(-1)
    odds, before = (w[..., :64].sum(-1) / w[..., 64:].sum(-1) for w in (weighed, plain))
    assert torch.allclose(odds, 0.25 * before, rtol=1e-4)
    assert denoiser._bias(windows._grids(weights), q, k[:, :77], {}) is None  # attention to a text


def test_persistence_acts_in_the_model(host, sd):
    latent = host.tiny.latent(16, 8, 4)
    outs = [host.ours(sd, latent, persistence=p, window=8, overlap=4, draft=0) for p in (0.3, 0.6, 1.0)]
    first = [o[..., :4, :] for o in outs]
    assert all(torch.equal(f, first[0]) for f in first)  # nothing came before the first block
    assert all(not torch.equal(a[..., 4:, :], b[..., 4:, :]) for a, b in itertools.pairwise(outs))


def test_persistence_without_effect_is_said(host, sd, monkeypatch, caplog):
    """Where text and picture attend together there is no attention of the picture alone to weigh."""
    run = {"window": 8, "overlap": 4, "draft": 0, "steps": 2}
    with caplog.at_level("INFO", logger="rolling_diffusion"):
        host.ours(sd, host.tiny.latent(16, 8, 4), **run)
        assert "changes nothing" not in caplog.text
        monkeypatch.setattr(host.module("sampler"), "per_block_noise", lambda *_: (False, "one noise level a call"))
        outs = [host.ours(host.tiny.flux(), host.tiny.latent(16, 8), persistence=p, **run) for p in (0.5, 1.0)]
    assert torch.equal(*outs) and caplog.text.count("attention_persistence changes nothing here: Flux") == 1


class Hint:
    """A ControlNet that records the hint it is given, pixel for pixel."""

    @staticmethod
    def make(image, height, width):
        import comfy.controlnet

        class Recording(comfy.controlnet.ControlBase):
            def __init__(self):
                super().__init__()
                self.seen = []

            def get_control(self, x, t, cond, count, options):
                import comfy.utils

                size = x.shape[-1] * 8, x.shape[-2] * 8
                if self.cond_hint is None or self.cond_hint.shape[-2:] != size[::-1]:
                    self.cond_hint = comfy.utils.common_upscale(
                        self.cond_hint_original, *size, "nearest-exact", "center"
                    )
                self.seen.append((tuple(x.shape[-2:]), self.cond_hint.clone()))
                return None

            def copy(self):
                return Recording()

        return Recording().set_cond_hint(image)


def test_controlnet_gets_the_crop_of_each_window(host, sd):
    image = torch.rand(1, 3, 24 * 8, 8 * 8, generator=torch.Generator().manual_seed(0))
    control = Hint.make(image, 24, 8)
    previous = Hint.make(1 - image, 24, 8)
    control.set_previous_controlnet(previous)
    prompts = [[[c[0][0], {**c[0][1], "control": control, "control_apply_to_uncond": False}]] for c in host.prompts]
    host.ours(sd, host.tiny.latent(24, 8, 4), steps=1, window=16, overlap=8, draft=0, prompts=prompts)
    hints = [hint for _, hint in control.seen]
    windows = [image[:, :, 0:160], image[:, :, 16:176], image[:, :, 32:192]]
    assert len(hints) >= 3
    for hint in hints:
        assert any(hint.shape == w.shape and torch.equal(hint, w) for w in windows)
    assert all(any(h.shape == w.shape and torch.equal(h, w) for h in hints) for w in windows)
    assert torch.equal(control.cond_hint_original, image)


def structures(host):
    """Models that ComfyUI gives one noise level a call, with two prompts each."""
    tiny = host.tiny
    clip = tiny.conditioning
    xl = [tiny.conditioning(i, width=768 + 1280, pooled=1280) for i in (1, 2)]
    return {
        "SD 1.5": (tiny.sd, (clip(1), clip(2))),
        "SDXL": (tiny.sdxl, xl),
        "SDXL refiner": (lambda: tiny.sdxl(refiner=True), [clip(i, width=1280, pooled=1280) for i in (1, 2)]),
        "PixArt Sigma": (tiny.pixart, (clip(1), clip(2))),
    }


@pytest.mark.parametrize("name", ["SD 1.5", "SDXL", "SDXL refiner", "PixArt Sigma"])
def test_real_structures(host, name):
    """One block is KSampler's, bit for bit; windows run in strips and tiles, on odd sizes too."""
    make, prompts = structures(host)[name]
    model, even = make(), name == "PixArt Sigma"  # it takes whole tokens, from ComfyUI's own samplers too
    latent = host.tiny.latent(48, 36 if even else 29, 4)
    stock = host.stock(model, latent, prompts=prompts)
    assert torch.equal(host.ours(model, latent, window=64, prompts=prompts), stock)
    for order in ("top-to-bottom", "spiral-out"):
        for draft in (-1, 0):
            run = {"order": order, "window": 24, "overlap": 12 if even else 9, "steps": 2, "draft": draft}
            out = host.ours(model, latent, prompts=prompts, **run)
            assert out.shape == stock.shape and out.isfinite().all() and not torch.equal(out, stock)


def test_pixart_gets_a_window_that_it_can_take(host):
    """Its positions are not defined below 34×34 cells: there ComfyUI's own code divides by zero."""
    make, prompts = structures(host)["PixArt Sigma"]
    model, seen = host.calls(make())
    out = host.ours(model, host.tiny.latent(96, 64, 4), steps=2, window=32, overlap=16, order="spiral-out",
                    prompts=prompts, cfg=1.0)  # fmt: skip
    assert out.isfinite().all() and {call[:2] for call in seen} == {(96, 64), (34, 34)}


def test_a_transformer_is_told_where_its_window_lies(host, monkeypatch):
    """Through ComfyUI's own option for positions, on top of what a node set there; nothing is left in it."""
    import comfy.ldm.flux.model

    model = host.tiny.flux()
    monkeypatch.setattr(host.module("sampler"), "per_block_noise", lambda *_: (False, "one noise level a call"))
    told, inner = [], comfy.ldm.flux.model.Flux._forward

    def forward(self, x, *args, **kwargs):
        options = kwargs.get("transformer_options") or next(a for a in args if isinstance(a, dict) and "wrappers" in a)
        told.append((x.shape[-2], options.get("rope_options")))
        return inner(self, x, *args, **kwargs)

    monkeypatch.setattr(comfy.ldm.flux.model.Flux, "_forward", forward)
    run = {"steps": 2, "window": 24, "overlap": 8, "draft": 1, "cfg": 1.0}
    host.ours(model, host.tiny.latent(48, 8), **run)
    if not hasattr(type(model), "set_model_rope_options"):  # older ComfyUIs: instead, the whole canvas is seen
        assert told == [(48, None)] * 4
        return
    assert told[0] == (48, None) and [each[0] for each in told[1:]] == [32] * 3
    assert [each[1]["shift_y"] for each in told[1:]] == [0, 4, 8]  # tokens of two cells
    assert all(each[1]["shift_x"] == 0 for each in told[1:])
    told.clear()
    scaled = model.clone()
    scaled.model_options["transformer_options"]["rope_options"] = {"scale_y": 0.5, "shift_y": 3.0}
    host.ours(scaled, host.tiny.latent(48, 8), **run)
    assert [each[1]["shift_y"] for each in told] == [3, 3, 5, 7]


@pytest.mark.parametrize("order", ["top-to-bottom", "spiral-out"])
def test_areas_and_masks_are_those_of_the_canvas(host, sd, order):
    """A prompt on the left half: the right half of the first call's answer is the other prompt's alone."""
    mask = torch.zeros(1, 16, 16)
    mask[..., :8] = 1
    area = host.tiny.conditioning(3, area=(16, 8, 0, 0), strength=1.0)
    masked = host.tiny.conditioning(4, mask=mask, mask_strength=1.0, set_area_to_bounds=False)
    for extra in (area, masked):
        prompts = host.prompts[0] + extra, host.prompts[1]
        out = host.ours(sd, host.tiny.latent(16, 16, 4), window=8, overlap=4, order=order, draft=0, prompts=prompts)
        plain = host.ours(sd, host.tiny.latent(16, 16, 4), window=8, overlap=4, order=order, draft=0)
        assert out.isfinite().all() and not torch.equal(out, plain)


def test_gligen_is_refused_with_a_sentence(host, sd):
    prompts = host.tiny.conditioning(1, gligen=("position", sd.clone(), [])), host.prompts[1]
    with pytest.raises(ValueError, match="GLIGEN"):
        host.ours(sd, host.tiny.latent(16, 8, 4), window=8, overlap=4, draft=0, prompts=prompts)


def test_video_latents_roll_over_rows_and_columns(host, sd):
    """Five dimensions: the plan is over the last two."""
    plan = host.module("settings").Settings(window=8, overlap=4).plan(16, 8, 4, 1)
    assert [b.height for b in plan.blocks] == [4, 4, 4, 4]


def test_foreign_flux_falls_back_with_a_line(host, caplog):
    """A wrapped transformer (as nunchaku's) is denoised in windows, and the log says why."""
    model = host.tiny.flux().clone()

    class Foreign(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner, self.dtype, self.patch_size = inner, inner.dtype, inner.patch_size

        def forward(
            self, x, timestep, context, y=None, guidance=None, control=None, transformer_options=None, **kwargs
        ):
            return self.inner(x, timestep, context, y, guidance, None, control, {}, **kwargs)

    inner = model.model.diffusion_model
    model.model.diffusion_model = Foreign(inner)
    try:
        with caplog.at_level("INFO", logger="rolling_diffusion"):
            out = host.ours(model, host.tiny.latent(16, 8), window=8, overlap=4)
    finally:
        model.model.diffusion_model = inner
    assert out.isfinite().all() and "Foreign takes one noise level a call" in caplog.text


def test_what_a_mask_keeps_is_seen_as_it_is(host, sd):
    """In every call, windows included, cells outside the mask are the picture's own, noised; and in previews."""
    import comfy.samplers

    kept, seen, shown = host.tiny.latent(32, 8, 4, seed=1), [], []
    kept["noise_mask"] = torch.ones(1, 1, 32, 8)
    kept["noise_mask"][..., 4:] = 0
    model = sd.clone()

    def wrapper(apply, args):
        seen.append((args["input"][:1].clone(), args["timestep"][0]))
        return apply(args["input"], args["timestep"], **args["c"])

    model.set_model_unet_function_wrapper(wrapper)
    model.set_model_denoise_mask_function(lambda sigma, mask, extra_options: mask)  # so nothing is given beforehand
    settings = host.module("settings").Settings("top-to-bottom", 16, 8, draft=1)
    rolling = host.module("sampler").Rolling(comfy.samplers.sampler_object("euler"), settings)
    sampling = model.get_model_object("model_sampling")
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(*host.prompts)
    guider.set_cfg(1.0)
    noise = torch.randn(1, 4, 32, 8, generator=torch.Generator().manual_seed(2))
    sigmas = comfy.samplers.calculate_sigmas(sampling, "simple", 3)
    show = lambda step, x0, x, total: shown.append(x0.clone())  # noqa: E731
    out = guider.sample(
        noise, kept["samples"], rolling, sigmas, kept["noise_mask"][0], callback=show, disable_pbar=True, seed=3
    )
    latent = sd.model.process_latent_in(kept["samples"])
    windows = [each for each in seen if each[0].shape[-2] < 32]
    assert len(windows) == 4 * 2 and torch.allclose(out[..., 4:], kept["samples"][..., 4:], atol=1e-5)
    for x, sigma in windows:
        true = sampling.noise_scaling(sigma, noise.clone(), latent)
        places = [true[..., top : top + x.shape[-2], 4:] for top in range(32 - x.shape[-2] + 1)]
        assert min(float((x[..., 4:] - place).abs().max()) for place in places) < 1e-4
    assert all(torch.allclose(x0[..., 4:], latent[..., 4:], atol=1e-5) for x0 in shown)


def test_previews_of_windows_show_the_picture_appearing(host, sd, monkeypatch):
    """After each call the newest x0 of the block that moved, and of all others what was known before."""
    import latent_preview

    shown, calls = [], []
    monkeypatch.setattr(
        latent_preview, "prepare_callback", lambda *_: lambda i, x0, x, n: shown.append((i, n, x0.clone()))
    )
    model, calls = host.calls(sd)
    out = host.ours(model, host.tiny.latent(32, 8, 4), steps=4, window=16, overlap=8, draft=1, cfg=1.0)
    assert [i for i, _, _ in shown] == list(range(len(calls))) and {n for _, n, _ in shown} == {len(calls)}
    for (_, _, before), (_, _, after) in itertools.pairwise(shown[1:]):
        rows = (before != after).any(-1)[0, 0].nonzero().flatten()
        assert len(rows) == 8 and rows[0] % 8 == 0  # one block
    assert torch.allclose(shown[-1][2][..., -8:, :], sd.model.process_latent_in(out)[..., -8:, :], atol=1e-5)


@pytest.mark.parametrize("refiner", [False, True])
def test_sdxl_is_told_where_its_window_begins(host, refiner):
    """By its crop coordinates, which its own code is asked for here; the canvas's size and all else stay."""
    width, pooled = (1280, 1280) if refiner else (768 + 1280, 1280)
    said = {"crop_h": 8, "crop_w": 0, "target_width": 128, "target_height": 512}
    prompts = [host.tiny.conditioning(i, width=width, pooled=pooled, **said) for i in (1, 2)]
    model, told = host.tiny.sdxl(refiner=refiner).clone(), []

    def wrapper(apply, args):
        told.append((args["input"].shape[-2], args["c"]["y"][0].clone()))
        return apply(args["input"], args["timestep"], **args["c"])

    model.set_model_unet_function_wrapper(wrapper)
    run = {"steps": 1, "window": 16, "overlap": 8, "draft": 0, "cfg": 1.0, "prompts": prompts}
    host.ours(model, host.tiny.latent(32, 8, 4), **run)
    size = {"width": 64, "height": 256, "pooled_output": prompts[0][0][1]["pooled_output"], "device": "cpu"}

    def expected(crop):
        return model.model.encode_adm(**{**size, **said, "crop_h": crop})[0]

    height = told[0][0]
    assert height < 32 and torch.equal(told[0][1], expected(8))
    tops = [min(max(8 * block + 4 - height // 2, 0) // 4 * 4, 32 - height) for block in range(4)]
    for (_, y), top in zip(told, tops, strict=True):
        assert torch.allclose(y, expected(8 + top * 512 / 32), atol=1e-5)


def test_a_mask_that_is_changed_stays_where_it_stood(host):
    masked, like = host.module("canvas").masked, torch.zeros(2)
    args, kw = masked((torch.tensor([True, False]), "precision"), {"other": 1}, like, lambda mask: mask + 1)
    assert args[1:] == ("precision",) and kw == {"other": 1}
    assert args[0][0] == 1 and args[0][1] < -1e30
    args, kw = masked((), {"mask": None}, like, lambda mask: like if mask is None else mask)
    assert args == () and kw == {"mask": like}
