"""Training: the encoder that is written down, the states that are trained on, and checkpoints that survive a kill."""

import json
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader

pytest.importorskip("diffusers")

from rolling_diffusion.cli import main
from rolling_diffusion.defaults import Card
from rolling_diffusion.train.checkpoint import SAID, Average, read, write
from rolling_diffusion.train.diffusion import (
    CANVASES,
    Sketches,
    Source,
    new_transformer,
    rolling_loss,
    train,
    uniform_loss,
)
from rolling_diffusion.train.export import export, parts
from rolling_diffusion.train.labels import Questions, labels
from rolling_diffusion.train.optimiser import Muon
from rolling_diffusion.train.samples import PROMPTS, Samples
from rolling_diffusion.train.text import (
    CLIP_IDS,
    LENGTH,
    T5_IDS,
    clip_tokens,
    embed,
    grow,
    lesson,
    new_encoders,
    t5_tokens,
    train_text,
)
from rolling_diffusion.train.vae import decode, encode, linear_encoder, new_vae, pictures, train_decoder
from rolling_diffusion.world.caption import SYNONYMS
from rolling_diffusion.world.scene import COLOURS, KINDS, RADIUS, Scene, Thing
from rolling_diffusion.world.strip import STEPS


@pytest.fixture(scope="module")
def vae():
    torch.manual_seed(0)
    return new_vae(pictures(np.random.default_rng(0), 12)).eval()


@pytest.fixture()
def source(vae):
    torch.manual_seed(0)
    return Source(linear_encoder(vae), new_encoders(), seed=3)


def test_the_tiny_autoencoder_computes_the_principal_components(vae):
    x = pictures(np.random.default_rng(1), 2)
    by_hand = encode(x, *linear_encoder(vae))
    with torch.no_grad():
        by_network = vae.encode(x * 2 - 1).latents
    assert by_network.shape == (2, 16, 32, 32)
    assert (by_network - by_hand).abs().max() < 1e-4
    assert 0.2 < by_hand.std() < 1.0


def test_the_linear_decoder_gives_the_nearest_pictures(vae):
    x, linear = pictures(np.random.default_rng(1), 2, 128, 192), linear_encoder(vae)
    z = encode(x, *linear)
    y = decode(z, *linear)
    assert y.shape == x.shape and y.min() >= 0 and y.max() <= 1
    assert (y - x).abs().mean() < 0.03  # edges blur
    grey = torch.full((1, 3, 8, 16), 0.5)
    assert (encode(decode(encode(grey, *linear), *linear), *linear) - encode(grey, *linear)).abs().max() < 1e-3


def test_decoder_training_lowers_its_error_and_resumes(vae, tmp_path):
    said = []
    path = tmp_path / "decoder.safetensors"
    x = encode(pictures(np.random.default_rng(2), 1), *linear_encoder(vae))

    def error():
        with torch.no_grad():
            y = (vae.decode(x[..., :8, :8]).sample + 1) / 2
        return (y - pictures(np.random.default_rng(2), 1)[..., :64, :64]).abs().mean()

    before = error()
    train_decoder(vae, path, 8, batch=2, pool=2, log=said.append)
    assert read(path)[1]["step"] == 8
    train_decoder(vae, path, 14, batch=2, pool=2, log=said.append)
    assert read(path)[1]["step"] == 14
    assert error() < before


def test_every_word_of_a_caption_has_its_token():
    texts, truth = lesson(np.random.default_rng(0), 40)
    ids, clip = t5_tokens(texts), clip_tokens(texts)
    assert ids.shape == clip.shape == (40, LENGTH)
    assert not (ids == 2).any() and not (clip == 2).any()  # 2 is the unknown word
    assert t5_tokens(["a red zebra"])[0, 2] == 2
    for text, row, tags in zip(texts, ids, truth["kind"]):
        words = len(text.split())
        assert row[words] == 1 and (row[words + 1 :] == 0).all()
        assert (tags[words:] == 0).all()


def test_encoders_that_knew_no_synonyms_read_each_as_its_older_word():
    t5, clip = new_encoders()
    assert max(T5_IDS.values()) + 1 == len(T5_IDS) == t5.config.vocab_size
    older = len(T5_IDS) - len(SYNONYMS), len(CLIP_IDS) - len(SYNONYMS)
    for encoder, size in zip((t5, clip), older):
        encoder.resize_token_embeddings(size, mean_resizing=False)
    before = embed(t5, clip, ["two houses below a purple boat at sunset"])
    grow(t5, clip)
    after = embed(t5, clip, ["two houses below a purple boat at sunset"])
    said = embed(t5, clip, ["2 Cottages beneath a violet sailboat at sunrise"])
    assert all(torch.equal(x, y) and torch.equal(x, z) for x, y, z in zip(before, after, said))
    assert t5.config.vocab_size == len(T5_IDS) and clip.config.vocab_size == len(CLIP_IDS)
    assert not any(p.requires_grad for p in (*t5.parameters(), *clip.parameters()))
    clip.resize_token_embeddings(30, mean_resizing=False)
    with pytest.raises(ValueError, match="know 30 words"):
        grow(t5, clip)


def test_text_training_reads_back_what_it_wrote(tmp_path):
    path = tmp_path / "text.safetensors"
    trained = train_text(path, 3, batch=4, log=lambda _: None)
    again = train_text(path, 3, log=lambda _: None)
    one, two = (embed(*encoders, ["a red ball at night", ""]) for encoders in (trained, again))
    assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1])
    assert not torch.equal(one[0][0], one[0][1])


def test_a_new_model_predicts_nothing_and_both_losses_have_gradients(source):
    model = new_transformer()
    batch = source.finish(source.sketch(128, 128, 2))
    expected = (batch.noise - batch.tokens).square().mean()
    loss, chosen = uniform_loss(model, source, batch)
    assert torch.equal(chosen, batch.own) and len(chosen) == 64
    assert torch.isclose(loss, expected, rtol=1e-3)
    for turn in range(12):  # draws whole canvases, memories and crops alike, and pictures that continue another
        batch = source.finish(source.sketch(128, 128, 2, [None, *STEPS][turn % 5]))
        model.zero_grad()
        rolling_loss(model, source, batch)[0].backward()
        grad = model.proj_out.weight.grad
        assert grad is not None and grad.isfinite().all() and grad.abs().max() > 0


@pytest.mark.parametrize("side", STEPS)
def test_a_stretch_sees_the_picture_that_it_continues_and_learns_none_of_it(source, side):
    batch = source.finish(source.sketch(192, 128, 2, side))
    picture = batch.ids[batch.own]
    assert picture.amin(0).tolist() == [0, 0, 0] and picture.amax(0).tolist() == [0, 7, 11]
    others = torch.ones(len(batch.ids), dtype=torch.bool)
    others[batch.own] = False
    seen = batch.ids[others, 1 if side in ("top", "bottom") else 2]
    edge = 8 if side in ("top", "bottom") else 12
    if side in ("left", "top"):
        assert seen.max() == -1 and -8 <= seen.min() <= -2
    else:
        assert seen.min() == edge and edge + 1 <= seen.max() <= edge + 7
    assert not batch.labels[:, others].any()
    model = new_transformer()
    with torch.no_grad():
        model.proj_out.weight.normal_(0, 0.1)
        for block in (*model.transformer_blocks, *model.single_transformer_blocks):
            norm = block.norm1 if hasattr(block, "norm1") else block.norm
            norm.linear.weight.normal_(0, 0.1)  # open gates: tokens see each other

    def loss(batch):
        source.rng, source.generator = np.random.default_rng(5), torch.Generator().manual_seed(5)
        return [f(model, source, batch)[0].item() for f in (uniform_loss, rolling_loss)]

    one = loss(batch)
    alone = torch.where(others[None, :, None], 9.0, batch.noise)  # no noise of the picture before comes in
    assert loss(replace(batch, noise=alone)) == one
    other = torch.where(others[None, :, None], batch.tokens + 1, batch.tokens)
    assert all(a != b for a, b in zip(loss(replace(batch, tokens=other)), one))


def test_muon_takes_the_steps_of_torchs_own():
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("torch has a Muon from 2.9 on")
    torch.manual_seed(0)
    start = [torch.randn(8, 24), torch.randn(24, 8), torch.randn(8, 24)]
    ours, theirs = ([nn.Parameter(x.clone()) for x in start] for _ in range(2))
    options = {"lr": 0.01, "weight_decay": 0.02}
    one = Muon(ours, **options)
    other = torch.optim.Muon(theirs, **options, ns_steps=4, adjust_lr_fn="match_rms_adamw")
    for _ in range(3):
        for a, b in zip(ours, theirs):
            a.grad = b.grad = torch.randn(a.shape)
        one.step()
        other.step()
    for a, b, x in zip(ours, theirs, start):
        assert torch.allclose(a, b, atol=2e-3) and (a - x).abs().max() > 0.01  # theirs computes in bfloat16


def test_levels_are_stratified(source):
    levels = source.levels(1000)
    quarters = torch.sigmoid(1.6 + 1.1 * torch.special.ndtri(torch.tensor([0.25, 0.5, 0.75])))
    assert levels.sort().values[[250, 500, 750]].sub(quarters).abs().max() < 0.01
    assert (levels.sort().values != levels).any()


def test_labels_say_what_stands_at_a_token():
    things = (Thing("star", "blue", 48, 32), Thing("ball", "red", 112, 96))
    truth = labels([Scene(160, 128, "day", "snow", things)]).unflatten(1, (8, 10))[0]
    assert truth.shape == (8, 10, 4)
    kinds, colours = truth[..., 0].long(), truth[..., 1].long()
    assert kinds[1, 2] == KINDS.index("star") + 1 and colours[1, 2] == list(COLOURS).index("blue") + 1
    assert kinds[6, 7] == KINDS.index("ball") + 1 and colours[6, 7] == list(COLOURS).index("red") + 1
    assert truth[1, 2, 2:].tolist() == pytest.approx([-8 / RADIUS, -8 / RADIUS])
    assert (kinds > 0).sum() == 2 * 16 and torch.equal(kinds > 0, colours > 0)  # 52 pixels show 4 × 4 tokens' centres
    assert truth[0, 9].tolist() == [0, 0, 0, 0]


def test_questions_teach_the_middle_and_listen_to_every_kind_of_call(source):
    model = new_transformer()
    questions = Questions(model)
    batch = source.finish(source.sketch(128, 128, 2))
    uniform_loss(model, source, batch)
    questions(batch.labels).backward()
    assert model.transformer_blocks[0].attn.to_q.weight.grad is not None
    assert model.single_transformer_blocks[-1].attn.to_q.weight.grad is None
    model.zero_grad()
    uniform_loss(model, source, batch)
    questions(batch.labels, teach=False).backward()
    assert all(p.grad is None for p in model.parameters()) and questions.head[1].weight.grad is not None
    seen = set()
    for _ in range(8):
        _, chosen = rolling_loss(model, source, batch)
        assert questions(batch.labels[:, chosen]).isfinite()
        seen.add(len(chosen))
    assert len(seen) > 1


def test_transformer_training_learns_and_resumes(source, tmp_path, monkeypatch):
    monkeypatch.setattr("rolling_diffusion.train.diffusion.CANVASES", ((128, 128, 2), *CANVASES[1:]))
    monkeypatch.setattr("rolling_diffusion.train.diffusion.EARLY", (1, 0, 0, 0, 0, 0))
    monkeypatch.setattr("rolling_diffusion.train.diffusion.LATE", (1, 0, 0, 0, 0, 0))
    path = tmp_path / "uniform.safetensors"
    model = new_transformer()
    train(model, Questions(model), source, path, "uniform", 0.05, log=lambda _: None)
    step = read(path)[1]["step"]
    assert step >= 1 and model.proj_out.weight.abs().max() > 0
    fresh = new_transformer(seed=1)
    train(
        fresh, Questions(fresh), source, path, "uniform", 0.05, log=lambda _: None
    )  # its time is spent: it reads back and stops
    assert read(path)[1]["step"] == step
    assert torch.equal(fresh.proj_out.weight, model.proj_out.weight)


@pytest.mark.parametrize("workers", [0, 2])
def test_whoever_renders_draws_scenes_of_its_own(source, workers, monkeypatch):
    monkeypatch.setattr("rolling_diffusion.train.diffusion.CANVASES", ((128, 128, 2), *CANVASES[1:]))
    late = torch.tensor(False).share_memory_()
    sketches = [*islice(DataLoader(Sketches(source, late, 3), batch_size=None, num_workers=workers), 6)]
    squares = [sketch for sketch in sketches if sketch.rows == 8]
    assert squares and all(len(sketch.tokens) == len(sketch.captions) == 6 for sketch in squares)
    assert len({tuple(sketch.captions) for sketch in sketches}) == 6
    batch = source.finish(squares[0])
    assert batch.noise.shape == batch.tokens.shape and batch.noise.std() > 0.5
    assert torch.equal(batch.text, embed(*source.encoders, squares[0].captions)[0])


def test_a_checkpoint_is_whole_or_the_old_one(tmp_path):
    path = tmp_path / "x.safetensors"
    write(path, {"a": torch.ones(2)}, step=1)
    with pytest.raises(AttributeError):
        write(path, {"a": "no tensor"}, step=2)  # type: ignore[dict-item]
    assert read(path)[1] == {"step": 1}
    assert list(tmp_path.iterdir()) == [path]


@contextmanager
def full_disk():
    """No file grows beyond 16 KiB: safetensors fails as on a full disk."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**14, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture()
def stages(vae, monkeypatch):
    """`train` whose stages take no time; returns what the first of them does, which may be replaced."""
    first = {"text": lambda path: write(path, {"a": torch.zeros(1)}, steps=1)}

    def text(path, *_, **__):
        first["text"](path)
        return new_encoders()

    monkeypatch.setattr("rolling_diffusion.train.text.train_text", text)
    monkeypatch.setattr("rolling_diffusion.train.vae.pictures", lambda *_: None)
    monkeypatch.setattr("rolling_diffusion.train.vae.new_vae", lambda _: vae)
    for name in ("diffusion.train", "vae.train_decoder", "samples.Samples"):
        monkeypatch.setattr(f"rolling_diffusion.train.{name}", lambda *_, **__: None)
    return first


def test_a_full_disk_is_one_sentence_and_leaves_the_former_files(stages, tmp_path, capsys):
    path, model = tmp_path / "work" / "text.safetensors", tmp_path / "model"
    command = ["train", "--work", str(path.parent), "-o", str(model)]
    write(path, {"a": torch.ones(1)}, step=1)
    stages["text"] = lambda path: write(path, {"a": torch.zeros(2**16)}, step=2)
    with full_disk():
        assert main(command) == 1
    assert capsys.readouterr().err == f"rolling-diffusion: cannot read or write: {path}: File too large\n"
    assert read(path)[1] == {"step": 1} and list(path.parent.iterdir()) == [path]
    stages["text"] = lambda _: None
    assert main(command) == 0
    before = {file: file.read_bytes() for file in model.rglob("*") if file.is_file()}
    capsys.readouterr()
    with full_disk():
        assert main(command) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"rolling-diffusion: cannot read or write: {model}: ") and error.count("\n") == 1
    assert {file: file.read_bytes() for file in model.rglob("*") if file.is_file()} == before


def test_checkpoints_are_gone_on_with_by_what_they_were_made_with(stages, vae, tmp_path, capsys):
    work, first, other = tmp_path / "work", tmp_path / "first", tmp_path / "other"
    for number, folder in enumerate((first, other)):
        export(folder, new_transformer(number), *new_encoders(), vae, rolling=True)

    def said(*more):
        """Its exit code, and what it says on stderr, one line where it refuses."""
        capsys.readouterr()
        code = main(["train", "--work", str(work), "-o", str(tmp_path / "model"), *more])
        error = capsys.readouterr().err
        assert code != 2 or error.count("\n") == 1
        return code, error

    def killed(path):
        assert (work / SAID).is_file()  # before the first checkpoint
        raise KeyboardInterrupt

    kept, stages["text"] = stages["text"], killed
    assert said("--seed", "9")[0] == 130
    stages["text"] = kept
    assert said()[0] == said()[0] == 0  # nothing was made with seed 9
    assert list(work.glob("*.partial")) == []
    free = ("--uniform-minutes", "300", "--rolling-minutes", "200", "--workers", "1", "--device", "cpu")
    assert said(*free, "-o", str(tmp_path / "elsewhere"))[0] == 0
    for option, was in {"seed": 0, "text-steps": 1200, "decoder-steps": 1500, "batch": 1}.items():
        assert said(f"--{option}", "7") == (
            2,
            f"rolling-diffusion: {work} holds checkpoints of other settings, --{option} was {was}, and is now 7: "
            "say the same, name another --work, or delete it\n",
        )
    code, error = said("--start", str(first))
    assert code == 2 and "--start was nothing, and is now a model of SHA-256 " in error
    work = tmp_path / "further"
    assert said("--start", str(first))[0] == 0
    write(work / "uniform.safetensors", {"a": torch.zeros(1)}, step=1)
    assert said("--start", str(first))[0] == 0
    assert said("--start", str(other))[0] == 2
    code, error = said()
    assert code == 2 and "--start was a model of SHA-256 " in error and "and is now nothing: say the same" in error
    first.rename(tmp_path / "gone")
    other.rename(first)
    assert said("--start", str(first))[0] == 2  # the same name, another model
    assert said("--start", str(tmp_path / "gone"))[0] == 0
    assert "holds no vae" in said("--start", str(tmp_path))[1]
    for harm in (b"{", b"[]", b"{}", b"\xff"):
        (work / SAID).write_bytes(harm)
        code, error = said("--start", str(first))
        assert code == 2 and f"{work / SAID} cannot be read, and tells what" in error
    (work / SAID).unlink()  # as in earlier versions
    assert said("--seed", "5")[0] == said("--seed", "6")[0] == 0 and not (work / SAID).exists()


@pytest.mark.parametrize("harm", ["cut", "foreign", "unsaid", "none"])
def test_a_damaged_checkpoint_is_named_in_one_sentence(vae, source, tmp_path, harm):
    def stages():
        yield "text", lambda path: train_text(path, 1, batch=2, log=lambda _: None)
        yield "decoder", lambda path: train_decoder(vae, path, 1, batch=2, pool=2, log=lambda _: None)
        model = new_transformer()
        yield "uniform", lambda path: train(model, Questions(model), source, path, "uniform", 0, log=lambda _: None)

    for name, stage in stages():
        path = tmp_path / f"{name}.safetensors"
        stage(path)
        if harm == "cut":
            path.write_bytes(path.read_bytes()[:-100])
        elif harm == "foreign":
            write(path, {"model/x": torch.zeros(1)}, step=1, seconds=1.0)
        elif harm == "unsaid":
            save_file({"model/x": torch.zeros(1)}, path)
        else:
            stage(path)  # whole: it is taken up again
            continue
        with pytest.raises(ValueError, match=rf"{name}\.safetensors is damaged, or no checkpoint") as caught:
            stage(path)
        assert "\n" not in str(caught.value)


def test_an_exported_model_can_be_trained_further(vae, tmp_path):
    transformer, encoders = new_transformer(), new_encoders()
    export(tmp_path / "model", transformer, *encoders, vae, rolling=True)
    again_vae, (t5, clip), again = parts(tmp_path / "model")
    export(tmp_path / "further", again, t5, clip, again_vae, rolling=False)
    for name, trained in (("model", True), ("further", False)):
        card = Card.of(json.loads((tmp_path / name / "model_index.json").read_text())["rolling"])
        assert (card.trained, card.size, card.cfg) == (trained, 256, 2.5)
    assert not any(str(tmp_path) in path.read_text() for path in (tmp_path / "further").glob("*/config.json"))
    assert torch.equal(again.x_embedder.weight, transformer.x_embedder.weight.bfloat16().float())
    texts = ["a red ball", ""]
    for one, two in zip(embed(*encoders, texts), embed(t5, clip, texts)):
        assert torch.allclose(one, two, atol=1e-6)
    assert torch.equal(linear_encoder(again_vae)[0], linear_encoder(vae)[0])
    with pytest.raises(ValueError, match="holds no vae"):
        parts(tmp_path)
    (tmp_path / "model" / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(b"junk")
    with pytest.raises(ValueError, match=r"model (is not whole|cannot be loaded): ") as caught:
        parts(tmp_path / "model")
    assert "\n" not in str(caught.value)


def test_sample_grids_show_the_averaged_weights_and_leave_training_as_it_was(vae, source, tmp_path, monkeypatch):
    monkeypatch.setattr("rolling_diffusion.train.samples.PROMPTS", PROMPTS[:1])
    model = new_transformer()
    questions, samples = Questions(model), Samples(model, source.encoders, vae)
    average = Average(model, 0.9)
    samples(tmp_path / "new.png")
    with torch.no_grad():
        model.proj_out.weight.normal_(0, 0.1)
    own = model.proj_out.weight.clone()
    with average.instead_of(model):
        samples(tmp_path / "averaged.png")
    samples(tmp_path / "own.png")
    assert torch.equal(model.proj_out.weight, own)
    new, averaged, other = (np.asarray(Image.open(tmp_path / f"{n}.png")) for n in ("new", "averaged", "own"))
    assert new.shape == (512, 256, 3) and new.std() > 0
    assert (new == averaged).all() and not (new == other).all()
    batch = source.finish(source.sketch(128, 128, 1))  # a grid in between does not disturb the questions
    uniform_loss(model, source, batch)
    assert questions(batch.labels).isfinite()
