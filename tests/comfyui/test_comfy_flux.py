"""Flux in ComfyUI: a noise level per block, memory, and what happens around them."""

import pytest
import torch
from own_memory import counted


@pytest.fixture(scope="module")
def flux(host):
    return host.tiny.flux()


def probe(host, model, look, height=24, width=16, batch=1, cfg=3.0, latent=None, channels=16):
    """Run `look(guider, options, noise, latent)` where a sampler would run, inside a real guider."""
    import comfy.sample
    import comfy.samplers

    class Probe(comfy.samplers.Sampler):
        def sample(self, guider, sigmas, extra_args, callback, noise, latent_image=None, denoise_mask=None, quiet=True):
            self.answer = look(guider, extra_args["model_options"], noise, latent_image)
            return noise

    latent = host.tiny.latent(height, width, channels, batch)["samples"]
    noise = comfy.sample.prepare_noise(latent, 7)
    sampler = Probe()
    positive, negative = host.prompts
    comfy.sample.sample_custom(
        model, noise, cfg, sampler, torch.tensor([1.0, 0.5, 0.0]), positive, negative, latent, seed=3, disable_pbar=True
    )
    return sampler.answer


def denoiser(host, guider, options, noise, latent, order="top-to-bottom", multiple=2, persistence=1.0):
    rule = {"multiple": multiple, "persistence": persistence}
    plan = host.module("core.plan").make_plan(*noise.shape[-2:], 4, order=order, window=16, overlap=8, **rule)
    out = host.module("flux").FluxDenoiser(guider, options, 3, noise, latent, torch.tensor([1.0, 0.5, 0.0]), plan=plan)
    out.begin(noise)
    return out


def moving(host, denoiser, noise, sigmas):
    Moving = host.module("sampler").rollout.__globals__["Moving"]
    blocks = list(denoiser.plan.blocks)[: len(sigmas)]
    for block in blocks:
        denoiser.asked[block] = torch.full((noise.shape[0],), sigmas[0]), denoiser.options
    return [Moving(b, denoiser.cut(noise, b), torch.tensor(s)) for b, s in zip(blocks, sigmas)]


@pytest.mark.parametrize("order", ["top-to-bottom", "spiral-out"])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("kind", ["flux", "guidance", "flux2"])
def test_equal_levels_are_the_stock_model(host, kind, batch, order):
    """Through all hooks, the canvas in blocks at one level: exactly stock; modulated per level: to rounding."""
    if kind == "flux2":
        if not hasattr(__import__("comfy.supported_models").supported_models, "Flux2"):
            pytest.skip("this ComfyUI has no Flux 2")
        model, channels, multiple = host.tiny.flux2(), 128, 1
    else:
        model, channels, multiple = host.tiny.flux(guidance=kind == "guidance"), 16, 2

    def look(guider, options, noise, latent):
        stock = guider(noise, torch.full((batch,), 0.7), model_options=options, seed=3)
        d = denoiser(host, guider, options, noise, latent, order, multiple)
        blocks = list(d.plan.blocks)
        asked = moving(host, d, noise, [0.7] * len(blocks))
        kept = d.denoise(asked, keep=True)
        d.clear()
        together = d._joint(blocks, [0.7] * len(blocks), None)
        # Two levels to the pack, one number to the model.
        parted = d._joint(blocks, [0.7] + [0.7 + 1e-9] * (len(blocks) - 1), None)
        return stock, torch.stack([(k - d.cut(stock, b)).abs().max() for k, b in zip(kept, blocks)]), together, parted

    stock, kept, together, parted = probe(host, model, look, batch=batch, channels=channels)
    assert kept.max() == 0
    assert torch.equal(together, stock)
    assert (parted - stock).abs().max() < 2e-5


def rooms(host, name):
    """A module of the library, as the pack under test imports it."""
    import importlib

    return importlib.import_module(f"{host.room.rsplit('.', 1)[0]}.{name}")


class Library:
    """A denoiser as the rollout wants it, of the library's own rolling call and memory."""

    def __init__(self, host, transformer, text, pooled, plan):
        self.calls, self.flux = rooms(host, "models.call"), rooms(host, "models.flux")
        self.moving = rooms(host, "core.rollout").Moving
        self.memory = rooms(host, "core.memory").Memory(plan.rule)
        self.transformer, self.family, self.plan = transformer, self.flux.Flux(transformer), plan
        y, x = torch.meshgrid(torch.arange(plan.height // 2), torch.arange(plan.width // 2), indexing="ij")
        self.request = {
            "encoder_hidden_states": text,
            "pooled_projections": pooled,
            "img_ids": torch.stack([torch.zeros_like(y), y, x], -1).flatten(0, 1).float(),
            "txt_ids": torch.zeros(text.shape[1], 3),
        }

    @torch.no_grad()
    def denoise(self, moving, keep=False, kind="waiting"):
        canvas = moving[0].x.new_zeros(*moving[0].x.shape[:2], self.plan.height, self.plan.width)
        for block, x, _ in moving:
            canvas[..., block.rows, block.columns] = x
        tokens = [self.family.tokens(block, self.plan.width) for block, *_ in moving]
        counts = [len(t) for t in tokens]
        levels = sorted({float(m.sigma) for m in moving})
        index = torch.tensor([levels.index(float(m.sigma)) for m in moving]).repeat_interleave(torch.tensor(counts))
        blocks = [block for block, *_ in moving]

        def store(layer, key, value):
            for block, k, v in zip(blocks, key.split(counts, 1), value.split(counts, 1)):
                self.memory.put(kind, block, layer, k, v)

        answer = self.calls.run(
            self.family,
            self.transformer,
            {**self.request, "hidden_states": self.flux.pack(canvas)},
            torch.cat(tokens),
            (self.plan.height, self.plan.width),
            self.calls.Levels.of(torch.tensor(levels), index),
            self.memory.view(blocks, free=not keep),
            store if keep else None,
        )[0]
        velocities = [self.flux.unpack(v, b.height, b.width) for v, b in zip(answer.split(counts, 1), blocks)]
        return [m.x - m.sigma * v for m, v in zip(moving, velocities)]

    def commit(self, block, x0):
        self.denoise([self.moving(block, x0, torch.tensor(0.0))], True, "finished")

    def start(self, block):
        self.memory.start(block)


def test_levels_and_memory_are_the_librarys(host):
    """The same weights in the library's own denoiser: levels, waiting and finished memory, persistence.

    ComfyUI and diffusers themselves differ by rounding, which random weights amplify: that is the measure.
    """
    pytest.importorskip("diffusers")
    from diffusers import FluxTransformer2DModel

    model = host.tiny.flux()
    state = {k.replace("_norm.weight", "_norm.scale"): v for k, v in model.model.diffusion_model.state_dict().items()}
    reference = FluxTransformer2DModel(
        patch_size=1, in_channels=64, num_layers=1, num_single_layers=2, attention_head_dim=128, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=24, axes_dims_rope=(16, 56, 56),
    ).eval()  # fmt: skip
    reference.load_state_dict(rooms(host, "models.convert").flux_from_comfy(state))

    def look(guider, options, noise, latent):
        d = denoiser(host, guider, options, noise, latent, persistence=0.5)
        text, extra = host.prompts[0][0]
        other = Library(host, reference, text, extra["pooled_output"], d.plan)
        out = []
        for each in (d, other):
            blocks = moving(host, d, noise, [0.75, 0.75, 0.75])
            plain = each.denoise(blocks)
            each.denoise(blocks, keep=True)
            each.start(blocks[0].block)
            each.start(blocks[1].block)
            first = each.denoise([blocks[0]._replace(sigma=torch.tensor(0.5)), blocks[1]])
            each.commit(blocks[0].block, first[0])
            second = each.denoise([blocks[1]._replace(sigma=torch.tensor(0.25))])
            out.append((plain, [*first, *second]))
        return out

    (plain, ours), (library_plain, library) = probe(host, model, look, cfg=1.0)
    apart = max((a - b).abs().max() for a, b in zip(plain, library_plain))  # ComfyUI and diffusers, in a stock call
    assert apart < 1e-2
    for a, b in zip(ours, library):
        assert (a - b).abs().max() < 3 * apart


def test_persistence_0_costs_nothing_and_1_costs_a_commit_each(host, flux):
    """12 rows in strips of 4, one step of draft: calls are ticks, plus one for waiting blocks, plus commits."""
    latent = host.tiny.latent(16, 8)
    ticks = host.module("settings").Settings(window=8, overlap=4, draft=1).plan(16, 8, 4, 2).ticks
    for persistence, extra in ((0.0, 1), (1.0, 1 + 3)):
        model, seen = host.calls(flux)
        host.ours(model, latent, steps=4, window=8, overlap=4, draft=1, persistence=persistence, cfg=1.0)
        assert len(seen) == ticks + extra
    model, seen = host.calls(flux)
    host.ours(model, latent, steps=4, window=8, overlap=4, draft=1, persistence=0.0, lookahead=0, cfg=1.0)
    assert len(seen) == ticks


def test_persistence_lookahead_cap_and_context_noise_act(host, flux):
    latent = host.tiny.latent(24, 8)
    run = {"window": 8, "overlap": 4, "draft": 0}
    base = host.ours(flux, latent, persistence=1.0, **run)
    for change in ({"persistence": 0.5}, {"persistence": 0.0}, {"persistence": 1.0, "lookahead": 0},
                   {"persistence": 1.0, "memory_cap": 8}, {"persistence": 1.0, "context_noise": 0.2}):  # fmt: skip
        assert not torch.equal(host.ours(flux, latent, **run, **change), base), change


@pytest.mark.parametrize("kind", ["flux", "sd"])
def test_difficulty_is_an_order_that_the_draft_decides(host, kind, monkeypatch):
    """On Flux and in windows: what the same blocks give in that order from the start, in as many calls."""
    model, channels = (host.tiny.flux(), 16) if kind == "flux" else (host.tiny.sd(), 4)
    latent, run = host.tiny.latent(16, 16, channels), {"steps": 5, "window": 8, "overlap": 4, "draft": 2}
    kinds, found = host.module("core.plan").Plan, []
    decided = kinds.decided

    def watched(self, difficulty):
        found.append(decided(self, difficulty))
        return found[-1]

    monkeypatch.setattr(kinds, "decided", watched)
    counted, calls = host.calls(model)
    ours = host.ours(counted, latent, order="difficulty", **run)
    (plan,) = found
    assert plan.blocks.name == "difficulty" and list(plan.blocks) != list(plan.blocks)[::-1]
    explicit, same = host.calls(model)
    assert torch.equal(host.ours(explicit, latent, order=tuple(plan.blocks), **run), ours) and len(same) == len(calls)
    assert torch.equal(host.ours(model, latent, order="difficulty", steps=5), host.stock(model, latent, steps=5))
    with pytest.raises(ValueError, match="draft is 1 steps, and the order 'difficulty' needs at least 2"):
        host.ours(model, latent, order="difficulty", **run | {"draft": 1})
    assert len(found) == 1


def test_extrapolation_moves_what_waiting_memory_is_stored_from(host, flux):
    latent, run = host.tiny.latent(24, 8), {"steps": 4, "window": 8, "overlap": 4, "draft": 2}
    model, calls = host.calls(flux)
    base = host.ours(model, latent, **run)
    further, more = host.calls(flux)
    assert not torch.equal(host.ours(further, latent, **run, extrapolation=0.4), base)
    assert torch.equal(host.ours(flux, latent, **run, extrapolation=0.0), base)
    levels = [sigma for *_, sigma in calls], [sigma for *_, sigma in more]
    apart = [(a, b) for a, b in zip(*levels) if a != b]
    assert len(calls) == len(more) and apart == [(levels[0][4], pytest.approx(0.6 * levels[0][4]))] * len(apart)
    assert 1 <= len(apart) <= 2  # the call that stores them, for one prompt and for the other
    with pytest.raises(ValueError, match=r"extrapolation is 0\.4, and needs a draft"):
        host.ours(flux, latent, **run | {"draft": 0}, extrapolation=0.4)


def test_preview_grows_in_order_and_progress_counts_calls(host, flux, monkeypatch):
    """The rows of the preview that hold something grow from the top, and the bar ends where the calls end."""
    import latent_preview

    seen = []

    def callback(model, steps, out=None):
        return lambda step, x0, x, total: seen.append(
            (step, (x0[0].abs().sum((0, 2)) > 0).nonzero().max().item(), total)
        )

    monkeypatch.setattr(latent_preview, "prepare_callback", callback)
    model, calls = host.calls(flux)
    host.ours(model, host.tiny.latent(16, 8), steps=4, window=8, overlap=4, draft=0, lookahead=0, cfg=1.0)
    steps, rows, totals = zip(*seen)
    assert rows[0] == 3 and rows[-1] == 15 and list(rows) == sorted(rows)
    assert list(steps) == list(range(len(calls))) and set(totals) == {len(calls)}


@pytest.mark.parametrize("kind", ["flux", "sd"])
def test_cancel_stops_within_a_call_and_the_next_run_works(host, kind):
    import comfy.model_management as management

    model = getattr(host.tiny, kind)()
    latent = host.tiny.latent(16, 8, model.model.latent_format.latent_channels)
    before = host.ours(model, latent, window=8, overlap=4)
    calls = []

    def interrupt(apply, args):
        calls.append(1)
        if len(calls) == 5:
            management.interrupt_current_processing()
        return apply(args["input"], args["timestep"], **args["c"])

    stopped = model.clone()
    stopped.set_model_unet_function_wrapper(interrupt)
    with pytest.raises(management.InterruptProcessingException):
        host.ours(stopped, latent, window=8, overlap=4, cfg=1.0)
    assert len(calls) == 5
    assert torch.equal(host.ours(model, latent, window=8, overlap=4), before)


def test_memory_returns_to_where_it_was(host, flux):
    """No tensor of a run outlives it."""
    import gc

    def count():
        gc.collect()
        return sum(isinstance(o, torch.Tensor) for o in gc.get_objects())

    latent = host.tiny.latent(16, 8)
    host.ours(flux, latent, window=8, overlap=4)
    before = count()
    host.ours(flux, latent, window=8, overlap=4)
    assert count() <= before + 1


def test_memory_that_was_replaced_is_gone_at_once(host, flux, monkeypatch):
    with counted(rooms(host, "core.memory"), monkeypatch) as sizes:
        host.ours(flux, host.tiny.latent(32, 8), window=8, overlap=4)
    assert len(sizes) > 4 and max(sizes) <= 3, "one for each of two prompts, and the one that takes another's place"


def test_custom_sampling_leaves_noise_over_as_stock(host, flux):
    """SamplerCustomAdvanced on split sigmas: with one block the same as without our node, twice."""
    positive, negative = host.prompts
    guider = host.run("CFGGuider", model=flux, positive=positive, negative=negative, cfg=3.0)[0]
    euler = host.run("KSamplerSelect", sampler_name="euler")[0]
    sigmas = host.run("BasicScheduler", model=flux, scheduler="simple", steps=4, denoise=1.0)[0]
    high, low = host.run("SplitSigmas", sigmas=sigmas, step=2)
    noise, none = host.run("RandomNoise", noise_seed=4)[0], host.run("DisableNoise")[0]

    def sample(sampler, noise, sigmas, latent):
        return host.run("SamplerCustomAdvanced", noise=noise, guider=guider, sampler=sampler, sigmas=sigmas,
                        latent_image=latent)[0]  # fmt: skip

    def rolling(order, window, overlap):
        return host.run("RollingSampler", sampler=euler, autoregressive_order=order, rolling_window_size=window,
                        rolling_overlap=overlap, attention_persistence=0.5)[0]  # fmt: skip

    out = []
    for sampler in (euler, rolling("top-to-bottom", 64, 16)):
        first = sample(sampler, noise, high, host.tiny.latent(8, 8))
        out.append((first["samples"], sample(sampler, none, low, first)["samples"]))
    assert torch.equal(out[0][0], out[1][0]) and torch.equal(out[0][1], out[1][1])
    first = sample(rolling("random", 8, 4), noise, high, host.tiny.latent(16, 8))
    second = sample(rolling("random", 8, 4), none, low, first)["samples"]
    assert second.isfinite().all() and not torch.equal(second, first["samples"])
