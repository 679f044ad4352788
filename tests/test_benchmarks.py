"""The benchmark of FLUX.1-dev's full structure: its predictions, and its code on a small model."""

import json
import re
from pathlib import Path

import pytest

pytest.importorskip("diffusers")

from benchmarks import flux

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
