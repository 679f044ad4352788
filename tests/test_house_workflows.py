"""The example workflows: prompts that the embedded model knows, and a thumbnail for each."""

import json
import uuid
from pathlib import Path

import pytest

from rolling_diffusion.world.caption import split, vocabulary

FOLDER = Path(__file__).parent.parent / "example_workflows"
EXAMPLES = sorted(FOLDER.glob("*.json"))


def test_the_mission_s_two_and_three_more_ship():
    names = {path.stem for path in EXAMPLES}
    assert {"basic", "advanced"} < names and len(names) >= 5


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_prompts_for_the_embedded_model_hold_words_that_it_knows(path):
    workflow = json.loads(path.read_text(encoding="utf-8"))
    assert uuid.UUID(workflow["id"])  # or ComfyUI's page shows an alert
    nodes = workflow["nodes"]
    kinds = {node["type"] for node in nodes}
    assert path.with_suffix(".jpg").is_file()
    if "LoadEmbeddedRollingModel" not in kinds:
        return
    prompts = [n["widgets_values"][0] for n in nodes if n["type"].startswith(("CLIPTextEncode", "FluxDev"))]
    assert any(prompts)
    for prompt in prompts:
        assert set(split(prompt)) <= set(vocabulary()), prompt
