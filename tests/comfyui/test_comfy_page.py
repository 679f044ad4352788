"""The page itself, in headless Chromium against the real frontend. Skipped where selenium or Chromium is not there."""

import json
import os
import sys
import time
from pathlib import Path

import pytest
from own_browser import chromium, needs, shot, wait

PACK = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """A browser on a running ComfyUI's page, ready to be used."""
    if not os.environ.get("COMFYUI_PATH"):
        pytest.skip("COMFYUI_PATH is not set: make test-comfyui COMFYUI_PATH=/path/to/ComfyUI")
    needs()
    sys.path.insert(0, str(Path(__file__).parent))
    from own_server import Server

    server = Server(tmp_path_factory.mktemp("page"), os.environ["COMFYUI_PATH"])
    browser = chromium(tmp_path_factory.mktemp("profile"), "1600,1000")
    browser.set_script_timeout(120)
    browser.server = server
    try:
        known = {"Comfy.TutorialCompleted": True, "Comfy.InstalledVersion": "1.0.0", "Comfy.VueNodes.Enabled": False,
                 "Comfy.Minimap.Visible": False}  # fmt: skip
        server.post("/api/settings", known)
        browser.get(server.url)
        there = "return !!(window.app && window.app.graph && window.LiteGraph.registered_node_types.KSampler)"
        wait(browser, there, 120)
        yield browser
    finally:
        browser.quit()
        server.stop()


def test_widgets_show_the_defaults(page):
    values = page.execute_script("""
        window.app.graph.clear();
        const node = window.LiteGraph.createNode('AutoregressiveRollingDiffusionSampler');
        window.app.graph.add(node);
        return Object.fromEntries(node.widgets.map(w => [w.name, w.value]));""")
    expected = {"steps": 20, "cfg": 7, "denoise": 1, "autoregressive_order": "top-to-bottom", "rolling_window_size": 64,
                "rolling_overlap": 16, "attention_persistence": 0.5, "draft": -1, "lookahead": -1}  # fmt: skip
    assert {name: values[name] for name in expected} == expected


SHOWN = {
    "rolling": ("Rolling Plan Preview", "Autoregressive Rolling Diffusion Sampler", "Rolling Sampler"),
    "ksampler": ("Autoregressive Rolling KSampler (Advanced)",),
}


@pytest.mark.parametrize("word", SHOWN)
def test_nodes_are_found_by_search(page, word):
    """A double click on the canvas opens the search; typing shows the node, without scrolling."""
    from selenium.webdriver import ActionChains, Keys

    page.execute_script("window.app.graph.clear()")
    canvas = page.find_element("css selector", "canvas#graph-canvas")
    ActionChains(page).double_click(canvas).perform()
    time.sleep(2)
    ActionChains(page).send_keys(word).perform()
    time.sleep(2)
    shot(page, f"search-{word}")
    for name in SHOWN[word]:
        wait(page, f"return {VISIBLE}({json.dumps(name)})", 30)
    ActionChains(page).send_keys(Keys.ESCAPE).perform()


# Does an element with this text stand in the visible part of the page?
VISIBLE = """(text => [...document.querySelectorAll('*')].some(e => {
    if (e.textContent.trim() !== text) return false;
    const box = e.getBoundingClientRect();
    return box.height > 0 && box.bottom <= innerHeight && document.elementFromPoint(box.x + 2, box.y + box.height / 2);
}))"""


def test_a_workflow_queued_from_the_page_ends_with_a_picture(page):
    workflow = json.loads((PACK / "example_workflows" / "rolling_tall_canvas.json").read_text(encoding="utf-8"))
    for node in workflow["nodes"]:
        if node["type"] == "AutoregressiveRollingDiffusionSampler":
            node["widgets_values"][2] = 20 if page.server.real else 3
    page.execute_async_script(
        """const done = arguments[1];
        window.app.loadGraphData(arguments[0]).then(() => window.app.queuePrompt(0, 1)).then(done)""",
        workflow,
    )
    entry = None
    for _ in range(600):
        history = page.server.get("/history")
        if history:
            [entry] = history.values()
            break
        time.sleep(0.5)
    assert entry and entry["status"]["status_str"] == "success", entry
    assert any(output.get("images") for output in entry["outputs"].values())
    wait(page, "return window.app.graph._nodes.some(n => n.type === 'SaveImage' && n.imgs && n.imgs.length)", 30)
    page.execute_script("window.app.extensionManager.command.execute('Comfy.Canvas.FitView')")
    time.sleep(2)
    shot(page, "workflow")
    assert "Invalid workflow" not in page.execute_script("return document.body.innerText")


def load(page, change=None):
    """The tall canvas on the page, its sampler's widgets changed by name."""
    workflow = json.loads((PACK / "example_workflows" / "rolling_tall_canvas.json").read_text(encoding="utf-8"))
    page.execute_async_script(
        """const [workflow, change, done] = arguments;
        window.app.loadGraphData(workflow).then(() => {
            const node = window.app.graph._nodes.find(n => n.type === 'AutoregressiveRollingDiffusionSampler');
            for (const [name, value] of Object.entries(change)) node.widgets.find(w => w.name === name).value = value;
            done();
        })""",
        workflow,
        change or {},
    )


def run(page):
    """Press Run and wait until nothing is queued: the newest history entry, or None if it was refused."""
    before = set(page.server.get("/history"))
    page.execute_async_script("window.app.queuePrompt(0, 1).catch(() => 0).then(arguments[0])")
    for _ in range(600):
        new = set(page.server.get("/history")) - before
        queue = page.server.get("/queue")
        if new or not (queue["queue_running"] or queue["queue_pending"]):
            return page.server.get("/history")[new.pop()] if new else None
        time.sleep(0.5)
    raise TimeoutError("the run did not end")


def said(page, words):
    """The text on the sampler that holds these words."""
    sampler = "n => n.type === 'AutoregressiveRollingDiffusionSampler'"
    texts = f"window.app.graph._nodes.filter({sampler}).flatMap(n => n.widgets).map(w => String(w.value))"
    return wait(page, f"return {texts}.find(v => v.includes({json.dumps(words)}))", 20)


def test_one_block_is_said_on_the_node(page):
    load(page, {"rolling_window_size": 64, "steps": 2})
    assert run(page)["status"]["status_str"] == "success"
    assert said(page, "below 64").startswith("One block, as without rolling")
    page.execute_script("window.app.extensionManager.command.execute('Comfy.Canvas.FitView')")
    time.sleep(2)
    shot(page, "one-block")


def test_a_bad_value_is_one_error_in_the_page(page):
    load(page, {"sampler_name": "dpm_adaptive"})
    assert run(page) is None
    time.sleep(2)
    shot(page, "error-sampler")
    text = page.execute_script("return document.body.innerText")
    assert "2 errors" not in text.lower() and "5 errors" not in text.lower()
    page.execute_script("document.querySelectorAll('.p-dialog-close-button').forEach(b => b.click())")
    load(page, {"rolling_overlap": 64, "steps": 2})
    assert run(page)["status"]["status_str"] == "error"
    assert said(page, "rolling_overlap is 64, and must be below")
    shot(page, "error-overlap")
    page.execute_script("document.querySelectorAll('.p-dialog-close-button').forEach(b => b.click())")


def test_tooltips_and_the_help_page_open(page):
    """The mouse rests on a widget; the selected node's info button is pressed."""
    from selenium.webdriver import ActionChains

    x, y = page.execute_script("""
        window.app.graph.clear();
        const node = window.LiteGraph.createNode('AutoregressiveRollingDiffusionSampler');
        window.app.graph.add(node);
        const {canvas, ds} = window.app.canvas;
        ds.scale = 1;
        [ds.offset[0], ds.offset[1]] = [500 - node.pos[0], 250 - node.pos[1]];
        window.app.canvas.draw(true, true);
        const {left, top} = canvas.getBoundingClientRect();
        const row = node.widgets.find(w => w.name === 'rolling_overlap');
        return [left + 500 + node.size[0] / 2, top + 250 + (row.last_y ?? row.y) + 8];""")
    mouse = ActionChains(page)
    mouse.w3c_actions.pointer_action.move_to_location(int(x) - 3, int(y))
    mouse.w3c_actions.pointer_action.pause(0.2)
    mouse.w3c_actions.pointer_action.move_to_location(int(x), int(y))
    mouse.perform()
    tip = wait(page, "return document.querySelector('.node-tooltip')?.innerText", 20)
    assert tip.startswith("Cells that the window keeps when it moves on")
    shot(page, "tooltip")
    page.execute_script("window.app.canvas.selectNode(window.app.graph._nodes[0])")
    wait(page, "return document.querySelector('[data-testid=info-button]')", 20)
    page.find_element("css selector", "[data-testid=info-button]").click()
    assert wait(page, "return document.body.innerText.includes('KSampler, with the picture generated in an order')", 20)
    shot(page, "help")


BLUEPRINTS = sorted(path.stem for path in (PACK / "subgraphs").glob("*.json"))
# Gives the blueprint's node what it needs, and keeps its picture.
COMPLETE = """
    const [graph, widgets] = [window.app.graph, arguments[0]];
    const node = graph._nodes[0];
    const make = (type, x, y, values) => {
        const made = window.LiteGraph.createNode(type);
        graph.add(made);
        made.pos = [node.pos[0] + x, node.pos[1] + y];
        for (const [name, value] of Object.entries(values)) made.widgets.find(w => w.name === name).value = value;
        return made;
    };
    const give = (from, slot, name) => from.connect(slot, node, node.inputs.findIndex(input => input.name === name));
    const size = {width: widgets.width, height: widgets.height};
    const models = make('LoadEmbeddedRollingModel', -450, 0, {});
    ['model', 'clip', 'vae'].forEach((name, slot) => give(models, slot, name));
    if (node.inputs.some(input => input.name === 'mask')) {
        give(make('EmptyImage', -450, 200, {...size, color: 16711680}), 0, 'image');
        give(make('SolidMask', -450, 450, size), 0, 'mask');
    }
    node.connect(0, make('SaveImage', 500, 0, {}), 0);
    for (const widget of node.widgets) if (widget.name in widgets) widget.value = widgets[widget.name];
    return node.widgets.map(widget => [widget.label || widget.name, widget.value]);"""


@pytest.mark.parametrize("name", BLUEPRINTS)
def test_a_blueprint_takes_any_model_and_runs(page, name):
    workflow = json.loads((PACK / "subgraphs" / f"{name}.json").read_text(encoding="utf-8"))
    page.execute_async_script("window.app.loadGraphData(arguments[0]).then(arguments[1])", workflow)
    steps = 20 if page.server.real else 2
    widgets = {"text": "a red house", "width": 128, "height": 256, "steps": steps, "cfg": 2.5, "seed": 1,
               "rolling_window_size": 16, "rolling_overlap": 8}  # fmt: skip
    shown = page.execute_script(COMPLETE, widgets)
    assert {"autoregressive_order", "rolling_window_size", "prompt", "negative prompt"} <= {label for label, _ in shown}
    entry = run(page)
    assert entry and entry["status"]["status_str"] == "success", entry
    assert any(output.get("images") for output in entry["outputs"].values())
    page.execute_script("window.app.extensionManager.command.execute('Comfy.Canvas.FitView')")
    time.sleep(2)
    shot(page, name)
