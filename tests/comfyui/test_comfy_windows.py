"""Models with one noise level a call: windows, what fills them, and persistence."""

import itertools

import pytest
import torch


@pytest.fixture(scope="module")
def sd(host):
    return host.tiny.sd()


def test_windows_reach_over_what_came_before(host, sd):
    """Strips of 8 rows with 8 of overlap: the first call sees 8 rows, the others 16; one noise level each."""
    model, seen = host.calls(sd)
    host.ours(model, host.tiny.latent(24, 8, 4), steps=2, window=16, overlap=8, draft=0, cfg=1.0)
    assert len(seen) == 3 * 2
    assert sorted({call[0] for call in seen}) == [8, 16] and all(call[1] == 8 for call in seen)
    levels = [call[2] for call in seen]
    assert len(set(levels)) == 2 and levels[0] == max(levels)


def test_a_draft_is_the_whole_canvas(host, sd):
    model, seen = host.calls(sd)
    host.ours(model, host.tiny.latent(24, 8, 4), steps=3, window=16, overlap=8, draft=1, cfg=1.0)
    assert seen[0][0] == 24 and len(seen) == 1 + 3 * 2
    # After a draft there is something to see on both sides.
    assert max(call[0] for call in seen[1:]) == 24


def test_no_persistence_no_context_no_cost(host, sd):
    model, seen = host.calls(sd)
    host.ours(model, host.tiny.latent(24, 8, 4), steps=2, window=16, overlap=8, draft=0, persistence=0.0, cfg=1.0)
    assert {call[0] for call in seen} == {8}


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
    run = {"window": 8, "overlap": 4, "draft": 0}
    outs = [host.ours(sd, latent, persistence=p, **run) for p in (0.0, 0.3, 0.6, 1.0)]
    first = [o[..., :4, :] for o in outs]
    assert all(torch.equal(f, first[0]) for f in first)  # nothing came before the first block
    assert all(not torch.equal(a[..., 4:, :], b[..., 4:, :]) for a, b in itertools.pairwise(outs))


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
    windows = [image[:, :, 0:64], image[:, :, 0:128], image[:, :, 64:192]]
    assert len(hints) >= 3
    for hint in hints:
        assert any(hint.shape == w.shape and torch.equal(hint, w) for w in windows)
    assert all(any(h.shape == w.shape and torch.equal(h, w) for h in hints) for w in windows)
    assert torch.equal(control.cond_hint_original, image)


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
