"""The evaluation runs the real pipeline on the shipped model; and the shipped model is what its card says."""

import json
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline
from PIL import Image
from tiny_families import make

from rolling_diffusion.cli import main
from rolling_diffusion.evaluation import WAYS, OrderStudy, ceiling, evaluate, order_study, order_table, paint, table
from rolling_diffusion.evaluation_strip import at_once, evaluate_strips
from rolling_diffusion.pipeline import roll
from rolling_diffusion.train.export import tokenizers
from rolling_diffusion.train.text import clip_tokens, t5_tokens
from rolling_diffusion.train.vae import encode, linear_encoder
from rolling_diffusion.world.detect import detect
from rolling_diffusion.world.render import render
from rolling_diffusion.world.scene import random_scene
from rolling_diffusion.world.score import TASKS, Prompt, make_prompts

EMBEDDED = Path(__file__).parent.parent / "rolling_diffusion" / "embedded"


@pytest.fixture(scope="module")
def pipe():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = FluxPipeline.from_pretrained(EMBEDDED, local_files_only=True)
    loaded.set_progress_bar_config(disable=True)
    return roll(loaded)


def test_the_report_holds_every_way_task_and_interval(pipe):
    common = {"num_inference_steps": 2, "width": 128, "height": 128}
    report = evaluate(pipe, 6, seed=1, common=common, batch=4)
    assert list(report) == list(WAYS) == ["full", "rolling", "autoregressive"]
    for row in report.values():
        assert set(row["tasks"]) == {*TASKS, "relation"}
        low, high = row["interval"]
        assert 0 <= low <= row["score"] <= high <= 1
    assert report["full"]["against full"] == (0, 0, 0)
    assert json.loads(json.dumps(report))["full"]["score"] == report["full"]["score"]
    assert table(report).count("\n") == 1 + len(WAYS)


def test_pictures_depend_on_the_seed_alone_not_on_the_batch(pipe):
    prompts = make_prompts(3, 4)
    common = {"num_inference_steps": 2, "width": 128, "height": 128}
    together = paint(pipe, prompts, 0, {}, common)
    alone = paint(pipe, prompts[2:], 2, {}, common)
    assert np.abs(together[2].astype(int) - alone[0]).max() <= 1
    assert not np.array_equal(together[0], together[1])


def test_a_way_of_sampling_overrules_what_all_have_in_common(pipe):
    prompts, common = make_prompts(1, 4), {"num_inference_steps": 3, "width": 128, "height": 128}
    half, none = (paint(pipe, prompts, 0, {"draft": draft}, common) for draft in (2, 0))
    assert np.array_equal(half, paint(pipe, prompts, 0, {"draft": 2}, {**common, "draft": 0}))
    assert np.array_equal(none, paint(pipe, prompts, 0, {}, {**common, "draft": 0}))
    assert not np.array_equal(half, none)


SMALL = {"num_inference_steps": 6, "width": 32, "height": 32}
ROWS = ("extrapolation 0.4", "lag 1")  # for all prompts, and for a quarter


def study_of(pipe, work=None, only=ROWS):
    return OrderStudy(pipe, order_study(pipe.card, SMALL, only), 8, 5, batch=4, common=SMALL, work=work)


def test_the_study_of_orders_has_every_row_beside_full_sampling_of_equal_steps_and_equal_cost(pipe):
    rows = {row.name: row for row in order_study(pipe.card, {})}
    assert {"rolling", "draft of 0", "draft of 5", "random", "difficulty", "lag autoregressive", "extrapolation 0.4",
            "persistence 0.0", "text at mean level", "cfg 1.5", "full, cfg 1.5"} <= set(rows)  # fmt: skip
    study = OrderStudy(pipe, list(rows.values()), 480, 0)
    seen = set()
    for row in study.rows:
        seen.add(row.name)
        assert set(row.against) <= seen, "compared with what is drawn before"
        assert len(study.prompts_of(row)) == (480 if row.decides else 120)
        if row.against:
            equal, costly = (rows[name] for name in row.against)
            assert study.relative(equal) == 1 and equal.way["lag"] == costly.way["lag"] == 0
            assert abs(study.relative(costly) - study.relative(row)) <= 0.025, row.name  # half of one step of 20
            assert row.decides <= equal.decides and row.decides <= costly.decides
            assert equal.way.get("cfg") == costly.way.get("cfg") == row.way.get("cfg")
    assert rows["rolling"].decides and rows["extrapolation 0.4"].decides and not rows["difficulty"].decides
    for steps in (1, 2, 3, 8):
        assert order_study(pipe.card, {"num_inference_steps": steps})
    with pytest.raises(ValueError, match="the study has no row 'spiral': it has full, "):
        order_study(pipe.card, {}, ["spiral"])


def test_an_evaluation_tells_how_long_it_takes(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["evaluate", "--steps", "2", "--width", "32", "--height", "32", "--prompts", "6", "--batch", "6"]
    words += ["--dtype", "float32", "--device", "cpu", "--work", "work.jsonl"]
    assert main(words) == 0
    first = capsys.readouterr()
    assert "21 pictures in 3 ways take about" in first.err and "in float32" in first.err
    assert main(words) == 0
    again = capsys.readouterr()
    assert again.out == first.out and not again.err  # all of it was there


def test_a_study_that_is_killed_goes_on_where_it_was(pipe, tmp_path, capsys, monkeypatch):
    """kill -9, and a line cut short: what was judged is not judged again, and the result is the same."""
    monkeypatch.chdir(tmp_path)
    words = ["evaluate", "--study", "order", "--steps", "6", "--width", "32", "--height", "32", "--prompts", "8"]
    words += [word for row in ROWS for word in ("--row", row)]
    words += ["--seed", "5", "--batch", "4", "--dtype", "float32", "--device", "cpu", "--work", "work.jsonl"]
    work = tmp_path / "work.jsonl"
    program = "import sys; from rolling_diffusion.cli import main; sys.exit(main(sys.argv[1:]))"
    running = subprocess.Popen([sys.executable, "-c", program, *words], cwd=tmp_path)
    while not work.exists() or work.read_bytes().count(b"\n") < 2:
        assert running.poll() is None
        time.sleep(0.01)
    running.kill()
    running.wait()
    before = work.read_bytes()[: work.read_bytes().rfind(b"\n") + 1]
    work.write_bytes(before + before[: len(before) // 2].rpartition(b"\n")[2])
    assert main([*words, "--json", "report.json"]) == 0
    after = work.read_bytes()
    assert after.startswith(before) and after.endswith(b"\n")
    entries = [json.loads(line) for line in after.splitlines()]
    assert len({entry["key"] for entry in entries}) == len(entries) > before.count(b"\n") >= 2
    said = capsys.readouterr()
    assert "of them are in work.jsonl; the rest takes about" in said.err and "in float32" in said.err
    report = json.loads(Path("report.json").read_text())
    expected = json.loads(json.dumps(study_of(pipe).run()))
    assert {name: row for name, row in report.items() if name != "about"} == expected
    assert said.out.count("\n| ") == 1 + len(expected) and order_table(expected) in said.out
    full = report["extrapolation 0.4"]["equal steps"]
    assert full["row"] == "full" and len(full["difference"]) == 3 and report["extrapolation 0.4"]["pictures"] == 8
    assert main(words) == 0
    assert work.read_bytes() == after and not capsys.readouterr().err  # all of it was there
    for foreign in (b'{"full": {"score": 1}}', b"a diary"):
        work.write_bytes(foreign)  # without an end of the line
        assert main(words) == 2
        assert "the end of work.jsonl is not evaluate's" in capsys.readouterr().err and work.read_bytes() == foreign
    work.write_text('{"prompt": "a ball"}\n')
    assert main(words) == 2
    assert "line 1 of work.jsonl is not evaluate's" in capsys.readouterr().err


def test_an_order_that_the_draft_decides_is_each_picture_s_own(pipe):
    way, prompts = {"order": "difficulty", "draft": 2}, make_prompts(2, 5)
    together, alone = paint(pipe, prompts, 0, way, SMALL), paint(pipe, prompts[1:], 1, way, SMALL)
    assert np.array_equal(together[1], alone[0])


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["--study", "order", "--draft", "3"], "--study order has its own tasks and drafts"),
        (["--study", "order", "--row", "spiral"], "the study has no row 'spiral'"),
        (["--row", "full"], "--row is of --study order"),
        (["--strip", "2", "--height", "512"], "--height is not of --strip"),
        (["--strip", "2", "--held-out", "0"], "--held-out is not of --strip"),
        (["--strip", "2", "--batch", "4"], "--batch is not of --strip"),
        (["--keep", "there"], "--keep is of --strip"),
        (["--ceiling", "--cfg", "0"], "--cfg is not of --ceiling"),
        (["--ceiling", "--work", "here.jsonl"], "--work is not of --ceiling"),
        (["--study", "order", "--work", "no/where.jsonl"], "there is no folder"),
    ],
)
def test_what_an_evaluation_cannot_do_is_one_sentence(capsys, words, sentence):
    assert main(["evaluate", *words]) == 2
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1


def test_strips_are_judged_beside_pictures_and_the_whole_at_once(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    words = "evaluate --strip 3 --prompts 6 --seed 5 --steps 3 --keep kept --json strips.json"
    assert main(words.split(" ")) == 0
    report, said = json.loads(Path("strips.json").read_text()), capsys.readouterr().out
    assert main(words.split(" ")) == 2 and "kept has pictures already" in capsys.readouterr().err
    assert list(report) == ["pictures", "stream", "no memory", "tiles", "at once"]
    for name, row in report.items():
        assert row["pictures"] == 6 and row["borders"] == 4 and f"| {name} | {row['score']:.3f} |" in said
        kept = [Image.open(f"kept/{name.replace(' ', '-')}-{number}.png") for number in (1, 2)]
        assert [picture.size for picture in kept] == [(768, 256)] * 2
        assert row["stream against it"][0] == pytest.approx(report["stream"]["score"] - row["score"])
    assert report["pictures"]["stream against it"] == report["stream"]["against pictures"]
    assert report["no memory"]["step"] > 3 * report["stream"]["step"]  # without memory a border is seen


def test_the_whole_at_once_moves_every_token_in_every_call(pipe):
    prompts = [Prompt("single object", text, (), True) for text in ("a red ball", "a blue boat")]
    tokens = []
    hook = pipe.pipe.transformer.x_embedder.register_forward_pre_hook(lambda _, given: tokens.append(given[0].shape[1]))
    try:
        drawn = at_once(pipe, prompts, 3, {"num_inference_steps": 2})
    finally:
        hook.remove()
    assert set(tokens) == {2 * 256} and [picture.shape for picture in drawn] == [(256, 256, 3)] * 2


def test_strips_of_another_pipeline_are_refused_in_one_sentence_before_it_is_loaded(tmp_path, capsys):
    said = "strips are compared for FluxPipeline, and this is StableDiffusion3Pipeline"
    with pytest.raises(ValueError, match=said):
        evaluate_strips(roll(make("StableDiffusion3Pipeline")[0]), 2)
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusion3Pipeline"}')  # no part to load
    assert main(["evaluate", "--strip", "2", "--model", str(tmp_path)]) == 2 and said in capsys.readouterr().err


def test_tokenizers_give_the_ids_that_were_trained(pipe):
    texts = ["A red ball, and a BLUE star!", "", "zebra left of " * 20, "3 kites, 2 boats, 12 stars, 7 trees, 1st ball"]
    for tokenizer, fresh, expected in zip(
        (pipe.pipe.tokenizer, pipe.pipe.tokenizer_2), tokenizers(), (clip_tokens(texts), t5_tokens(texts))
    ):
        for one in (tokenizer, fresh):
            ids = one(texts, padding="max_length", max_length=32, truncation=True, return_tensors="pt").input_ids
            assert torch.equal(ids, expected)


def test_a_digit_is_read_as_its_name_where_the_model_knows_it(pipe):
    for tokenizer in (pipe.pipe.tokenizer, pipe.pipe.tokenizer_2):
        for digits, words in {"3 red balls": "three red balls", "1 ball, 2 stars": "one ball two stars"}.items():
            assert tokenizer(digits).input_ids == tokenizer(words).input_ids
        assert tokenizer("7 balls").input_ids == tokenizer("12 balls").input_ids == tokenizer("balls").input_ids


def test_the_autoencoder_keeps_what_the_detectors_need(pipe):
    rng = np.random.default_rng(21)
    scenes = [random_scene(rng) for _ in range(20)]
    x = torch.from_numpy(np.stack([render(s) for s in scenes])).permute(0, 3, 1, 2).float() / 255
    with torch.no_grad():
        latents = pipe.pipe.vae.encode(x * 2 - 1).latents
        assert (latents - encode(x, *linear_encoder(pipe.pipe.vae))).abs().max() < 1e-3
        decoded = (pipe.pipe.vae.decode(latents).sample / 2 + 0.5).clamp(0, 1)
    assert (decoded - x).abs().mean() < 0.03
    pictures = decoded.permute(0, 2, 3, 1).mul(255).byte().numpy()
    kept = [
        sorted((str(f.kind), str(f.colour)) for f in detect(picture)) == sorted((t.kind, t.colour) for t in s.things)
        for s, picture in zip(scenes, pictures)
    ]
    assert sum(kept) >= 19  # green on grass at night is what it may lose


def test_the_ceiling_is_that_of_the_renderer_and_of_the_autoencoder(pipe):
    report = ceiling(pipe.pipe, 9, seed=3, batch=5)
    assert list(report) == ["rendered", "and decoded"]
    assert all(row["pictures"] == 9 and row["score"] == 1 and row["invented"] == 0 for row in report.values())
    assert table(report).count("\n") == 3


def test_the_folder_is_small_and_holds_no_pickle():
    files = [f for f in EMBEDDED.rglob("*") if f.is_file()]
    assert sum(f.stat().st_size for f in files) <= 45_000_000
    assert {f.suffix for f in files} == {".json", ".safetensors"}
