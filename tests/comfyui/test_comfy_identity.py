"""One block is KSampler, bit for bit."""

import pytest
import torch

SCHEDULERS = ("simple", "karras", "beta")
SAMPLERS = [
    "euler", "euler_cfg_pp", "euler_ancestral", "euler_ancestral_cfg_pp", "heun", "heunpp2", "exp_heun_2_x0",
    "exp_heun_2_x0_sde", "dpm_2", "dpm_2_ancestral", "lms", "dpmpp_2s_ancestral", "dpmpp_2s_ancestral_cfg_pp",
    "dpmpp_sde", "dpmpp_sde_gpu", "dpmpp_2m", "dpmpp_2m_cfg_pp", "dpmpp_2m_sde", "dpmpp_2m_sde_gpu",
    "dpmpp_2m_sde_heun", "dpmpp_2m_sde_heun_gpu", "dpmpp_3m_sde", "dpmpp_3m_sde_gpu", "ddpm", "lcm", "ipndm", "ipndm_v",
    "deis", "res_multistep", "res_multistep_cfg_pp", "res_multistep_ancestral", "res_multistep_ancestral_cfg_pp",
    "gradient_estimation", "gradient_estimation_cfg_pp", "er_sde", "seeds_2", "seeds_3", "sa_solver", "sa_solver_pece",
    "ddim", "uni_pc", "uni_pc_bh2",
]  # fmt: skip


@pytest.fixture(scope="module", params=["flux", "sd"])
def model(host, request):
    return getattr(host.tiny, request.param)()


def channels(model):
    return model.model.latent_format.latent_channels


def test_every_sampler_of_ksampler_is_known(host):
    import comfy.samplers

    ours = {*SAMPLERS, *host.module("sampler").ADAPTIVE}
    assert set(comfy.samplers.KSampler.SAMPLERS) <= ours


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_one_block_is_ksampler(host, model, sampler):
    import comfy.samplers

    if sampler not in comfy.samplers.KSampler.SAMPLERS:
        pytest.skip(f"this ComfyUI has no {sampler}")
    latent = host.tiny.latent(8, 8, channels(model))
    for scheduler in SCHEDULERS:
        expected = host.stock(model, latent, sampler, scheduler)
        assert torch.equal(host.ours(model, latent, sampler, scheduler), expected), scheduler


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m_sde", "uni_pc", "ddim", "euler_cfg_pp"])
@pytest.mark.parametrize("case", ["img2img", "mask", "mask and img2img", "batch", "batch_index", "odd size"])
def test_one_block_is_ksampler_in_every_use(host, model, case, sampler):
    count = channels(model)
    latent = host.tiny.latent(8, 8, count, seed=3)
    mask = torch.zeros(1, 64, 64)
    mask[:, 20:] = 1
    denoise = 0.5 if "img2img" in case else 1.0
    if "mask" in case:
        latent["noise_mask"] = mask
    elif case == "batch":
        latent = host.tiny.latent(8, 8, count, batch=3)
    elif case == "batch_index":
        latent = {**host.tiny.latent(8, 8, count, batch=2), "batch_index": [4, 1]}
    elif case == "odd size":
        latent = host.tiny.latent(7, 9, count)
    expected = host.stock(model, latent, sampler, denoise=denoise)
    assert torch.equal(host.ours(model, latent, sampler, denoise=denoise), expected)


@pytest.mark.parametrize("cfg", [1.0, 4.0])
def test_guidance_is_ksamplers(host, model, cfg):
    latent = host.tiny.latent(8, 8, channels(model))
    assert torch.equal(host.ours(model, latent, cfg=cfg), host.stock(model, latent, cfg=cfg))


def test_denoise_0_gives_the_latent_back(host, model):
    latent = host.tiny.latent(8, 8, channels(model), seed=1)
    assert torch.equal(host.ours(model, latent, denoise=0.0), host.stock(model, latent, denoise=0.0))


def test_any_channel_count_of_an_empty_latent(host, model):
    latent = host.tiny.latent(8, 8, 4 if channels(model) == 16 else 16)
    assert torch.equal(host.ours(model, latent), host.stock(model, latent))


def test_the_model_is_untouched(host, model):
    """A KSampler run after ours gives what it gave before, and so does ours after another order."""
    latent = host.tiny.latent(16, 8, channels(model))
    options = repr(model.model_options)
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.model.modules()]
    before, rolled = host.stock(model, latent), host.ours(model, latent, window=8, overlap=4)
    host.ours(model, latent, window=8, overlap=0, order="spiral-out")
    assert torch.equal(host.stock(model, latent), before)
    assert torch.equal(host.ours(model, latent, window=8, overlap=4), rolled)
    assert repr(model.model_options) == options
    assert [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.model.modules()] == hooks


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_rolls(host, model, sampler):
    """Several blocks: finite, the whole canvas filled, and the same again from the same seed."""
    import comfy.samplers

    if sampler not in comfy.samplers.KSampler.SAMPLERS:
        pytest.skip(f"this ComfyUI has no {sampler}")
    latent = host.tiny.latent(16, 8, channels(model))
    out = host.ours(model, latent, sampler, window=8, overlap=4, draft=1)
    assert out.shape == host.stock(model, latent).shape and out.isfinite().all()
    assert torch.equal(host.ours(model, latent, sampler, window=8, overlap=4, draft=1), out)
