"""The benchmarks: predictions for FLUX.1-dev's full structure, its code on a small model, and shares of steps."""

import json
import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers")

from benchmarks import flux
from benchmarks.effort import Painter, Way

DOC = Path(__file__).parent.parent / "docs" / "flux.md"


def test_the_documented_predictions_are_those_that_the_command_prints():
    assert flux.predictions() in DOC.read_text(encoding="utf-8")


def test_the_documents_table_is_what_was_measured():
    found = json.loads(flux.RESULTS.read_text(encoding="utf-8"))
    assert flux.table(found, dry=False) in DOC.read_text(encoding="utf-8")


def test_the_documented_tables_of_scaling_are_those_that_the_command_prints():
    pytest.importorskip("ray")
    from benchmarks import batch

    assert batch.paper(json.loads(batch.RESULTS.read_text())) in DOC.with_name("scaling.md").read_text(encoding="utf-8")


def test_arithmetic_of_a_full_pass_is_flux_s():
    """74.4 TFLOP a forward at 1024² with 512 text tokens."""
    assert flux.arithmetic(flux.plan_of(1024, 1024, None), flux.FLUX) / flux.STEPS == pytest.approx(74.4e12, rel=2e-3)


def test_the_small_model_runs_every_case():
    bench = flux.Bench(dry=True)
    bench.sizes, bench.steps = ((128, 128),), 2
    found = {"operations a second": bench.rate()}
    for name, way in flux.WAYS.items():
        found[f"128x128, {name}, eager"] = bench.run(128, 128, way)
    rows = flux.table(found, dry=True).splitlines()
    assert len(rows) == 2 + len(flux.WAYS)
    assert all(re.search(r"\| eager \| \d+\.\d+ \| \d+\.\d+ \| \d+\.\d+ \| \d+% \|", row) for row in rows[2:])


def test_shared_steps_add_up_and_easy_blocks_are_never_behind():
    way = Way(6, 2, 6, 2)
    taken = [(0, 0)]
    for hard, easy in way.moves():
        taken.append((taken[-1][0] + hard, taken[-1][1] + easy))
    assert taken[-1] == (6, 2) and way.mean == 6
    assert all(easy / 2 >= hard / 6 for hard, easy in taken)


def test_equal_shares_of_steps_are_the_pipeline_s_picture_and_others_are_not():
    painter = Painter()
    said = {"prompt": "a red ball above a blue tree", "negative_prompt": "", "true_cfg_scale": painter.card.cfg}
    size = {"height": 256, "width": 256, "max_sequence_length": painter.card.max_sequence_length}
    generator = torch.Generator().manual_seed(3)
    (stock,) = painter.pipe(**said, **size, num_inference_steps=4, generator=generator, output_type="latent")[:1]
    equal, shared = (painter.latents(said["prompt"], 3, way) for way in (Way(4, 2, 2, 2), Way(4, 2, 3, 1)))
    assert torch.allclose(equal, stock, atol=1e-4)
    assert not torch.allclose(shared, stock, atol=1e-2)
