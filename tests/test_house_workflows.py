"""The example workflows: prompts that the embedded model knows, thumbnails. The blueprints: links that meet."""

import json
import uuid
from pathlib import Path

import pytest

from rolling_diffusion.comfy.places import read
from rolling_diffusion.world.caption import split, vocabulary

FOLDER = Path(__file__).parent.parent / "example_workflows"
EXAMPLES = sorted(FOLDER.glob("*.json"))


def test_a_search_for_rolling_finds_every_example():
    """ComfyUI's templates are found by the names of their files."""
    assert len(EXAMPLES) >= 5 and all(path.stem.startswith("rolling_") for path in EXAMPLES)


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
    several = [n["widgets_values"][0] for n in nodes if n["type"] in ("RollingPrompts", "RollingStream")]
    prompts += [prompt for text in several for _, prompt in read(text)]
    assert any(prompts)
    for prompt in prompts:
        assert set(split(prompt)) <= set(vocabulary()), prompt


BLUEPRINTS = sorted((FOLDER.parent / "subgraphs").glob("*.json"))


@pytest.mark.parametrize("path", BLUEPRINTS, ids=lambda path: path.stem)
def test_a_blueprint_is_one_node_whose_links_all_meet(path):
    workflow = json.loads(path.read_text(encoding="utf-8"))
    [node], [graph] = workflow["nodes"], workflow["definitions"]["subgraphs"]
    assert node["type"] == graph["id"] and node["title"] == graph["name"] == path.stem
    assert [(i["name"], i["type"]) for i in node["inputs"]] == [(i["name"], i["type"]) for i in graph["inputs"]]
    nodes, used = {n["id"]: n for n in graph["nodes"]}, set()
    for link in graph["links"]:
        end = (graph if link["target_id"] == -20 else nodes[link["target_id"]]), link["target_slot"]
        start = (graph if link["origin_id"] == -10 else nodes[link["origin_id"]]), link["origin_slot"]
        into = end[0]["outputs" if end[0] is graph else "inputs"][end[1]]
        out = start[0]["inputs" if start[0] is graph else "outputs"][start[1]]
        assert into["type"] == out["type"] == link["type"]
        assert link["id"] in (into["linkIds"] if end[0] is graph else [into["link"]])
        assert link["id"] in (out["linkIds"] if start[0] is graph else out["links"])
        used.add(link["id"])
    assert used == {i for n in nodes.values() for o in n["outputs"] for i in o["links"]} | {
        i for given in graph["inputs"] for i in given["linkIds"]
    }
    for number, name in node["properties"]["proxyWidgets"]:
        inside = {i["name"] for i in nodes[int(number)]["inputs"] if "widget" in i}
        assert name in inside | {"control_after_generate"}


def test_prompts_of_the_readme_s_strip_hold_words_that_the_model_knows():
    for prompt in (FOLDER.parent / "docs" / "strip.txt").read_text(encoding="utf-8").splitlines():
        assert set(split(prompt)) <= set(vocabulary()), prompt
