"""A noise mask: what it keeps is given. It is seen, not computed, and comes out as it was."""

import pytest
import torch

RUN = {"window": 16, "overlap": 8, "draft": 1, "steps": 3}


@pytest.fixture(params=["flux", "sd"])
def model(host, request):
    return getattr(host.tiny, request.param)()


def masked(host, model, height, width, drawn, batch=1):
    """A random latent; its mask (in pixels) is 1 in the rows and columns (cells) that are drawn."""
    latent = host.tiny.latent(height, width, model.model.latent_format.latent_channels, batch, seed=3)
    mask = torch.zeros(1, 1, 8 * height, 8 * width)
    rows, columns = drawn
    mask[..., 8 * rows.start : 8 * rows.stop, 8 * columns.start : 8 * columns.stop] = 1
    return {**latent, "noise_mask": mask}


def cells(model):
    """What the model computes from now on, in cells: the tokens of each call of a Flux, the windows of a UNet."""
    seen, inner = [], model.model.diffusion_model
    if hasattr(inner, "double_blocks"):
        hook = inner.double_blocks[0].register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(kwargs["img"].shape[1] * inner.patch_size**2), with_kwargs=True
        )
    else:
        hook = inner.register_forward_pre_hook(lambda module, args: seen.append(args[0][0, 0].numel()))
    return seen, hook


@pytest.mark.parametrize("order, height, width, rows, columns", [
    ("top-to-bottom", 32, 16, (16, 32), (0, 16)),
    ("left-to-right", 27, 35, (5, 14), (11, 28)),
    ("spiral-out", 24, 40, (0, 24), (30, 40)),
    ("difficulty", 27, 35, (5, 14), (11, 28)),
])  # fmt: skip
def test_what_is_kept_comes_out_bit_for_bit(host, model, order, height, width, rows, columns):
    run = {"order": order, "window": 8, "overlap": 0, "draft": 2 if order == "difficulty" else 1, "steps": 3}
    latent = masked(host, model, height, width, (slice(*rows), slice(*columns)), batch=2)
    out = host.ours(model, latent, cfg=1.0, **run)
    before = latent["samples"]
    kept = (out == before).all(0).all(0)
    assert out.isfinite().all()
    drawn = torch.zeros(height, width, dtype=torch.bool)
    drawn[slice(*rows), slice(*columns)] = True
    assert not kept[drawn].all() and (out - before)[..., drawn].abs().mean() > 0.05
    assert torch.allclose(out[..., ~drawn], before[..., ~drawn], atol=1e-4)  # blocks that are partly drawn, as KSampler
    far = torch.ones_like(drawn)  # a block is 8 cells thick
    far[max(rows[0] - 8, 0) : rows[1] + 8, max(columns[0] - 8, 0) : columns[1] + 8] = False
    assert kept[far].all()


def test_the_more_is_kept_the_less_is_computed(host, model):
    sums, calls = [], []
    for kept in (0, 16, 32, 48):
        seen, hook = cells(model)
        host.ours(model, masked(host, model, 64, 16, (slice(kept, 64), slice(0, 16))), cfg=1.0, **RUN)
        hook.remove()
        sums.append(sum(seen))
        calls.append(seen)
    assert sums[0] > sums[1] > sums[2] > sums[3]
    assert sums[3] < 0.5 * sums[0]
    if hasattr(model.model.diffusion_model, "double_blocks"):  # what is given, once; what is drawn, in every step
        assert calls[2][0] == 32 * 16 and max(calls[2][1:]) == 32 * 16
    else:
        assert calls[3][0] == (16 + 16) * 16  # the draft sees what is left, and a window of 16 cells beside it


def test_a_mask_over_the_whole_canvas_is_ksampler_s(host, model):
    latent = masked(host, model, 16, 8, (slice(0, 16), slice(0, 8)))
    assert torch.equal(host.ours(model, latent), host.stock(model, latent))
    plain = {"samples": latent["samples"]}
    assert torch.equal(host.ours(model, latent, **RUN), host.ours(model, plain, **RUN))


@pytest.mark.parametrize("sampler", ["euler", "heun", "euler_ancestral_cfg_pp", "dpmpp_2m_sde", "uni_pc"])
def test_what_is_left_may_be_one_block(host, model, sampler):
    latent = masked(host, model, 32, 8, (slice(20, 32), slice(0, 8)))
    out = host.ours(model, latent, sampler, **RUN)
    assert out.isfinite().all() and torch.equal(out[..., :20, :], latent["samples"][..., :20, :])
    assert not torch.allclose(out[..., 20:, :], latent["samples"][..., 20:, :], atol=0.1)
    assert torch.equal(out, host.ours(model, latent, sampler, **RUN))


def test_what_is_kept_is_seen(host, model):
    """Another picture beside it, and something else is drawn; unless nothing is remembered."""
    latent = masked(host, model, 32, 8, (slice(16, 32), slice(0, 8)))
    other = {**latent, "samples": latent["samples"].clone()}
    other["samples"][..., :16, :] *= -1
    for persistence, same in ((1.0, False), (0.0, True)):
        one, two = (host.ours(model, each, persistence=persistence, **RUN) for each in (latent, other))
        assert torch.equal(one[..., 16:, :], two[..., 16:, :]) == same


def test_a_mask_that_leaves_nothing_costs_nothing(host, model):
    latent = masked(host, model, 32, 8, (slice(0, 0), slice(0, 0)))
    seen, hook = cells(model)
    assert torch.equal(host.ours(model, latent, **RUN), latent["samples"]) and seen == []
    hook.remove()


def test_kept_is_said(host, model, caplog):
    with caplog.at_level("INFO", logger="rolling_diffusion"):
        host.ours(model, masked(host, model, 32, 8, (slice(16, 32), slice(0, 8))), **RUN)
    assert "The mask keeps 50% of the picture: it is seen, and not computed." in caplog.text


def test_masks_that_move_with_the_noise_keep_nothing_for_good(host, model, caplog):
    """Differential diffusion decides in each step anew what is kept."""
    changing = host.run("DifferentialDiffusion", model=model)[0]
    with caplog.at_level("INFO", logger="rolling_diffusion"):
        out = host.ours(changing, masked(host, model, 32, 8, (slice(16, 32), slice(0, 8))), **RUN)
    assert out.isfinite().all() and "The mask keeps" not in caplog.text


def test_noise_that_is_left_over_is_left_on_what_is_kept(host, model):
    latent = masked(host, model, 32, 8, (slice(16, 32), slice(0, 8)))
    node = {"add_noise": "enable", "noise_seed": 5, "steps": 4, "cfg": 1.0, "sampler_name": "euler",
            "scheduler": "simple", "start_at_step": 0, "end_at_step": 3, "return_with_leftover_noise": "enable",
            "positive": host.prompts[0], "negative": host.prompts[1], "model": model,
            "latent_image": latent}  # fmt: skip
    rolling = {"autoregressive_order": "top-to-bottom", "rolling_window_size": 16, "rolling_overlap": 8,
               "attention_persistence": 0.5}  # fmt: skip
    stock = host.run("KSamplerAdvanced", **node)[0]["samples"]
    ours = host.run("AutoregressiveRollingDiffusionSamplerAdvanced", **node, **rolling)[0]["samples"]
    # KSampler's started with a little more noise than that of the first level, as samplers from full noise do.
    assert torch.allclose(ours[..., :16, :], stock[..., :16, :], rtol=0.01, atol=0.01)
