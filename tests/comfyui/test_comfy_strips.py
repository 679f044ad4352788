"""Canvases that grow, and prompts that change along them: Rolling Stream, Rolling Extend, Rolling Prompts."""

import pytest
import torch
from PIL import Image

PROMPTS = "a red house\na blue tree\nthe sun"
RUN = {"seed": 3, "steps": 2, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple", "rolling_window_size": 8,
       "rolling_overlap": 0, "attention_persistence": 1.0, "draft": 1}  # fmt: skip
STREAM = {"negative_prompt": "", "length": 384, "across": 32, "stretch": 128, "context": 64, "prompts": PROMPTS}


@pytest.fixture(scope="module")
def parts(host, tmp_path_factory):
    """MODEL, CLIP and VAE of a small folder: a Flux, and an autoencoder made of convolutions alone."""
    import tiny_folder

    names = ("model", "clip", "vae")
    return dict(zip(names, host.module("embedded").load(tiny_folder.make(tmp_path_factory.mktemp("model")))))


@pytest.fixture
def output(host, tmp_path, monkeypatch):
    import folder_paths

    monkeypatch.setattr(folder_paths, "get_output_directory", lambda: str(tmp_path))
    return tmp_path


def stream(host, parts, **change):
    values = {"autoregressive_order": "left-to-right", "filename_prefix": "one/strip", **STREAM, **RUN, **change}
    return host.nodes["RollingStream"]().draw(**parts, **values)["result"]


@pytest.mark.parametrize("order", ["left-to-right", "bottom-to-top"])
def test_a_strip_is_its_slices_and_what_the_vae_decodes_of_the_whole(host, parts, output, monkeypatch, order):
    growing, drawn = host.module("growing"), []
    inner = growing.Growing.stretch

    def stretch(self, *args):
        drawn.append(inner(self, *args))
        return drawn[-1]

    monkeypatch.setattr(growing.Growing, "stretch", stretch)
    image, folder = stream(host, parts, autoregressive_order=order)
    way = growing.Along.of(order)
    size = (32, 384) if way.axis == 3 else (384, 32)
    assert image.shape == (1, *size, 3) and [each.shape[way.axis] for each in drawn] == [16] * 3
    files = sorted(output.glob("one/strip_*/*"))
    assert [path.name for path in files] == ["00001.png", "00002.png", "state.safetensors"]  # the first ends too early
    assert str(files[0].parent) == folder
    pictures = [Image.open(path) for path in files[:2]]
    assert sum(picture.size[3 - way.axis] for picture in pictures) == 384
    whole = growing.decoded(parts["vae"], way.join(*drawn)).movedim(1, -1)
    assert (image - whole).abs().max() < 1 / 255


def test_cancelled_it_goes_on_where_it_stopped(host, parts, output, monkeypatch):
    import comfy.model_management

    module, growing = host.module("stream"), host.module("growing")
    run = {"context": 128}  # as long as a stretch: then what is kept of one is kept for two reasons
    expected, _ = stream(host, parts, filename_prefix="whole", **run)
    inner, drawn = growing.Growing.stretch, []

    def stretch(self, number, *args):
        drawn.append(number)
        return inner(self, number, *args)

    def stop(self, done, total):
        if done < total:
            raise comfy.model_management.InterruptProcessingException

    monkeypatch.setattr(growing.Growing, "stretch", stretch)
    with monkeypatch.context() as stopping:
        stopping.setattr(module.Strip, "show", stop)
        for _ in range(2):
            with pytest.raises(comfy.model_management.InterruptProcessingException):
                stream(host, parts, **run)
    image, folder = stream(host, parts, **run)
    assert drawn == [0, 1, 2] and torch.equal(image, expected)
    again, same = stream(host, parts, **run)
    assert drawn == [0, 1, 2] and same == folder and torch.equal(again, expected)  # nothing is left to draw
    assert stream(host, parts, seed=4, **run)[1] != folder


def test_the_prompts_lie_where_they_were_said(host, parts):
    module = host.module("stream")
    grow = host.module("growing").Growing(parts["model"], host.module("settings").Settings(), 2, 1.0, "euler", "simple",
                                          "left-to-right")  # fmt: skip

    def lie(prompts, length):
        return [(part.start, part.length, part.prompt) for part in module.parts_of(prompts, length, grow, 16)]

    assert lie(PROMPTS, 0) == [(0, 16, "a red house"), (16, 16, "a blue tree"), (32, 16, "the sun")]
    assert lie("a tree", 320) == [(0, 16, "a tree"), (16, 16, "a tree"), (32, 8, "a tree")]
    assert lie("0: a\n0.75: b", 256) == [(0, 16, "a"), (16, 8, "a"), (24, 8, "b")]
    assert lie("0: a\n192: b", 0) == [(0, 16, "a"), (16, 8, "a"), (24, 16, "b")]


@pytest.mark.parametrize("change, sentence", [
    ({"length": 100}, "length is 100 pixels, and must be a multiple of 16: take 96."),
    ({"prompts": "0.0: a\n0.5: b", "length": 0}, "places that are shares, and length is 0"),
    ({"prompts": "a\n0.5: b"}, "prompts has places, but none for 'a'"),
    ({"prompts": "0.2: a"}, "prompts begins at 0.2, and must begin at 0."),
    ({"prompts": " \n"}, "prompts is empty"),
    ({"prompts": "0: a\n1.5: b"}, "a share is below 1"),
    ({"filename_prefix": "../elsewhere"}, "must stay within the output folder"),
])  # fmt: skip
def test_what_cannot_be_is_one_sentence(host, parts, output, change, sentence):
    with pytest.raises(ValueError, match=sentence):
        stream(host, parts, **change)


def test_slices_that_are_gone_are_missed(host, parts, output):
    stream(host, parts)
    next(output.glob("one/*/00001.png")).unlink()
    with pytest.raises(ValueError, match="was drawn and is gone: delete its folder"):
        stream(host, parts)


def test_settings_are_known_by_all_that_the_node_hangs_on(host):
    name = host.module("stream").settings_name
    graph = {"1": {"class_type": "Load", "inputs": {"file": "a"}},
             "2": {"class_type": "RollingStream", "inputs": {"model": ["1", 0], "seed": 3}}}  # fmt: skip
    other = {"9": graph["1"], "2": {**graph["2"], "inputs": {"model": ["9", 0], "seed": 3}}}
    changed = {**graph, "1": {"class_type": "Load", "inputs": {"file": "b"}}}
    assert name(graph, "2") == name(other, 2) != name(changed, "2") != ""
    assert name(None, None) == ""


@pytest.mark.parametrize("order", ["left-to-right", "top-to-bottom", "right-to-left"])
def test_places_begin_anew_with_each_stretch(host, order):
    """What is seen lies before them, or after them."""
    model, growing, told = host.tiny.flux(), host.module("growing"), []
    grow = growing.Growing(
        model, host.module("settings").Settings(order, 8, 0, draft=1), 2, 1.0, "euler", "simple", order
    )
    before = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(1))
    hook = model.model.diffusion_model.pe_embedder.register_forward_pre_hook(lambda _, args: told.append(args[0]))
    part = host.module("core.growing").Stretch(16, 16, "", False)
    out = grow.stretch(1, part, 8, *host.prompts, before)
    hook.remove()
    axis = 1 if grow.way.axis == 2 else 2
    seen, drawn = told[0][0, 5:, axis], told[1][0, 5:, axis]  # after five of text
    assert out.shape[grow.way.axis] == 16 and out.isfinite().all()
    if order == "right-to-left":
        assert (drawn.min(), drawn.max(), seen.min(), seen.max()) == (0, 7, 8, 11)
    else:
        assert (drawn.min(), drawn.max(), seen.min(), seen.max()) == (0, 7, -4, -1)


def test_models_in_windows_grow(host):
    model = host.tiny.sd()
    growing = host.module("growing")
    grow = growing.Growing(model, host.module("settings").Settings("left-to-right", 8, 0, draft=1), 2, 1.0, "euler",
                           "simple", "left-to-right")  # fmt: skip
    part = host.module("core.growing").Stretch(16, 16, "", False)
    out = [grow.stretch(1, part, 8, *host.prompts, sign * torch.ones(1, 4, 8, 8)) for sign in (1, -1)]
    assert out[0].shape == (1, 4, 8, 16) and not torch.equal(*out)


@pytest.mark.parametrize("side", ["top", "bottom", "left", "right"])
def test_a_picture_goes_on_and_stays_what_it_was(host, parts, side):
    image = torch.rand(2, 75, 90, 3, generator=torch.Generator().manual_seed(2))
    run = {**RUN, "side": side, "pixels": 70, "stretch": 48, "context": 32, "autoregressive_order": "away"}
    values = {name: parts[name] for name in ("model", "vae")}
    clip = parts["clip"]
    positive, negative = (clip.encode_from_tokens_scheduled(clip.tokenize(text)) for text in ("a red house", ""))
    out, latent = host.run("RollingExtend", image=image, positive=positive, negative=negative, **values, **run)
    tall = side in ("top", "bottom")
    assert out.shape == ((2, 145, 90, 3) if tall else (2, 75, 160, 3))
    kept = {"top": out[:, 70:], "bottom": out[:, :75], "left": out[:, :, 70:], "right": out[:, :, :90]}[side]
    assert torch.equal(kept, image) and out.isfinite().all()
    assert latent["samples"].shape[-2:] == ((8 + 10, 12) if tall else (10, 10 + 10))


def test_one_prompt_is_clip_text_encode(host, parts):
    values = {"clip": parts["clip"], "autoregressive_order": "top-to-bottom", "width": 64, "height": 64, "blend": 16}
    one = host.run("RollingPrompts", prompts="a red house", **values)[0]
    stock = host.run("CLIPTextEncode", clip=parts["clip"], text="a red house")[0]
    assert len(one) == 1 and "mask" not in one[0][1] and torch.equal(one[0][0], stock[0][0])


@pytest.mark.parametrize("order, first", [("top-to-bottom", (0, 0)), ("right-to-left", (0, -1))])
def test_masks_are_one_together_and_soft_between(host, parts, order, first):
    values = {"clip": parts["clip"], "autoregressive_order": order, "width": 128, "height": 128, "blend": 32}
    found = host.run("RollingPrompts", prompts="a\n0.5: b".replace("a", "0: a", 1), **values)[0]
    a, b = (cond[1]["mask"][0] for cond in found)
    assert torch.allclose(a + b, torch.ones(16, 16)) and a[first] == 1 and b[first] == 0
    assert len((a * b).nonzero()) == 4 * 16
    small = host.run("RollingPrompts", prompts="a\nb\na", latent=host.tiny.latent(24, 6), **values)[0]
    assert [cond[1]["mask"].shape for cond in small] == [(1, 24, 6)] * 3


@pytest.mark.parametrize("kind", ["flux", "sd"])
def test_a_prompt_costs_nothing_where_it_does_not_hold(host, kind):
    """As many rows of a batch as prompts that hold for a block; the whole canvas asks them all."""
    model = getattr(host.tiny, kind)()
    masks = torch.zeros(2, 1, 32, 8)
    masks[0, :, :16], masks[1, :, 16:] = 1, 1
    values = {"mask_strength": 1.0, "set_area_to_bounds": False}
    prompts = [host.tiny.conditioning(i, mask=mask, **values)[0] for i, mask in enumerate(masks)]
    rows = []
    hook = model.model.diffusion_model.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    run = {"window": 8, "overlap": 0, "draft": 1, "steps": 2, "persistence": 0.0, "cfg": 1.0, "lookahead": 0}
    latent = host.tiny.latent(32, 8, model.model.latent_format.latent_channels)
    out = host.ours(model, latent, prompts=(prompts, host.prompts[1]), **run)
    assert sum(rows) == 2 + 4  # a draft of two, then four blocks of one each
    both = host.ours(model, latent, prompts=(prompts[:1] + host.prompts[1], host.prompts[1]), **run)
    hook.remove()
    assert out.isfinite().all() and not torch.equal(out, both)
    same = [host.tiny.conditioning(1, mask=mask, **values)[0] for mask in masks]
    one = host.ours(model, latent, prompts=(host.tiny.conditioning(1), host.prompts[1]), **run)
    assert torch.allclose(host.ours(model, latent, prompts=(same, host.prompts[1]), **run), one, atol=1e-4)
