"""The pack in a running ComfyUI: the example workflows, bad values, help pages, cancel."""

import io
import json
import sys
from pathlib import Path

import pytest
from PIL import Image

PACK = Path(__file__).resolve().parents[2]
WORKFLOWS = sorted(path.stem for path in (PACK / "example_workflows").glob("*.json"))
NODES = ("AutoregressiveRollingDiffusionSampler", "AutoregressiveRollingDiffusionSamplerAdvanced",
         "FluxDevAutoRegressiveRollingDiffusionSampler", "RollingSampler", "LoadEmbeddedRollingModel",
         "RollingPlanPreview", "RollingStream", "RollingExtend", "RollingPrompts")  # fmt: skip
SIZES = {"rolling_tall_canvas": (256, 512), "rolling_stream": (768, 256), "rolling_extend": (384, 256),
         "rolling_prompts": (512, 256)}  # fmt: skip


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    import os

    if not os.environ.get("COMFYUI_PATH"):
        pytest.skip("COMFYUI_PATH is not set: make test-comfyui COMFYUI_PATH=/path/to/ComfyUI")
    sys.path.insert(0, str(Path(__file__).parent))
    from own_server import Server

    server = Server(tmp_path_factory.mktemp("server"), os.environ["COMFYUI_PATH"])
    yield server
    server.stop()


def workflow(server, name):
    return server.api(json.loads((PACK / "example_workflows" / f"{name}.json").read_text(encoding="utf-8")))


def pictures(server, entry):
    assert entry["status"]["status_str"] == "success", entry["status"]
    files = [image for output in entry["outputs"].values() for image in output.get("images", [])]
    paths = [f"/view?filename={f['filename']}&subfolder={f['subfolder']}&type={f['type']}" for f in files]
    return [Image.open(io.BytesIO(server.get(path))) for path in paths]


def test_the_nodes_are_there_with_the_mandated_inputs(server):
    info = {name: server.get(f"/object_info/{name}")[name] for name in NODES}
    ours = info[NODES[0]]["input"]["required"]
    assert list(ours) == ["model", "positive", "negative", "latent_image", "seed", "steps", "cfg", "sampler_name",
                          "scheduler", "denoise", "autoregressive_order", "rolling_window_size", "rolling_overlap",
                          "attention_persistence"]  # fmt: skip
    defaults = {name: spec[1]["default"] for name, spec in ours.items() if "default" in spec[1]}
    assert defaults == {"seed": 0, "steps": 20, "cfg": 7.0, "denoise": 1.0, "autoregressive_order": "top-to-bottom",
                        "rolling_window_size": 64, "rolling_overlap": 16, "attention_persistence": 0.5}  # fmt: skip
    assert ours["autoregressive_order"][0] == ["top-to-bottom", "left-to-right", "spiral-out", "difficulty"]
    assert (
        ours["sampler_name"][0]
        == server.get("/object_info/KSampler")["KSampler"]["input"]["required"]["sampler_name"][0]
    )
    for node in info.values():
        for kind, inputs in node["input"].items():
            assert kind == "hidden" or all(spec[1].get("tooltip") for spec in inputs.values() if len(spec) > 1)


def test_help_pages_locales_and_workflows_are_served(server):
    for name in NODES:
        page = server.get(f"/extensions/autoregressive-rolling-diffusion/docs/{name}.md")
        assert page.startswith(b"# ")
    translations = server.get("/i18n")
    for language in ("en", "zh", "ja"):
        known = translations[language]["nodeDefs"]
        for name in NODES:
            spec = server.get(f"/object_info/{name}")[name]["input"]
            inputs = {**spec.get("required", {}), **spec.get("optional", {})}
            assert set(known[name].get("inputs", {})) == set(inputs), (language, name)
    templates = server.get("/workflow_templates")["autoregressive-rolling-diffusion"]
    assert sorted(templates) == WORKFLOWS


def test_blueprints_are_listed_and_served(server):
    blueprints = server.blueprints()
    if blueprints is None:
        pytest.skip("this ComfyUI has no blueprints")
    files = {path.stem: path.read_text(encoding="utf-8") for path in (PACK / "subgraphs").glob("*.json")}
    assert len(files) == 3 and blueprints.keys() == files.keys()
    for name, number in blueprints.items():
        assert server.get(f"/global_subgraphs/{number}")["data"] == files[name]


@pytest.mark.parametrize("name", WORKFLOWS)
def test_example_workflows_end_with_a_picture(server, name):
    prompt = workflow(server, name)
    for node in prompt.values():
        if "steps" in node["inputs"]:  # fewer: the tests share a machine
            node["inputs"]["steps"] = 6 if server.real else 3
    if name == "rolling_image_to_image":
        Image.new("RGB", (64, 48), (90, 140, 210)).save(server.base / "input" / "example.png")
    images = pictures(server, server.run(prompt))
    assert len(images) == (2 if name in ("rolling_custom_sampler", "rolling_stream") else 1)
    assert all(len(image.convert("RGB").getcolors(1 << 24)) > 50 for image in images)
    assert SIZES.get(name, (256, 256)) in [image.size for image in images]


BAD = [  # the change, the input at fault, what is said of it
    ({"rolling_window_size": 8}, "rolling_window_size", "smaller than min of 16"),
    ({"sampler_name": "dpm_adaptive"}, "sampler_name", "dpm_adaptive chooses its own noise levels"),
    ({"sampler_name": "eular"}, "sampler_name", "eular is not a sampler of this ComfyUI"),
    ({"steps": 0}, "steps", "smaller than min of 1"),
    ({"autoregressive_order": "sideways"}, "autoregressive_order", "sideways"),
    ({"attention_persistence": 1.5}, "attention_persistence", "bigger than max of 1.0"),
]
UNFIT = [  # values that are each allowed, and do not go together
    ({"rolling_overlap": 64}, "rolling_overlap is 64, and must be below rolling_window_size, which is 32."),
    ({"draft": 20, "steps": 20}, "draft is 20, and must be below steps, which is 20"),
]


def tall_canvas(server, change):
    prompt = workflow(server, "rolling_tall_canvas")
    [(number, node)] = [(k, n) for k, n in prompt.items() if n["class_type"] == NODES[0]]
    node["inputs"].update(change)
    return prompt, number


@pytest.mark.parametrize("change, name, sentence", BAD)
def test_a_bad_value_is_one_short_error_on_the_input_at_fault(server, change, name, sentence):
    prompt, number = tall_canvas(server, change)
    status, answer = server.post("/prompt", {"prompt": prompt})
    assert status == 400
    [error] = answer["node_errors"][number]["errors"]
    assert error["extra_info"]["input_name"] == name
    said = f"{error['message']} {error['details']}"
    assert all(word in said for word in sentence.split(" ")), said
    assert len(error["details"]) < 160, said


@pytest.mark.parametrize("change, sentence", UNFIT)
def test_values_that_do_not_go_together_are_one_error_before_anything_runs(server, change, sentence):
    prompt, number = tall_canvas(server, change)
    for node in prompt.values():  # nothing of it may be in ComfyUI's cache
        if node["class_type"] == "CLIPTextEncode":
            node["inputs"]["text"] += f" {sorted(change)}"
    # Decoding takes the loader's VAE, lazy or not: here nothing but the sampler leads to it.
    prompt = {k: n for k, n in prompt.items() if n["class_type"] not in ("VAEDecode", "SaveImage")}
    prompt["latent"] = {"class_type": "SaveLatent", "inputs": {"samples": [number, 0], "filename_prefix": "unfit"}}
    entry = server.run(prompt)
    [error] = [m[1] for m in entry["status"]["messages"] if m[0] == "execution_error"]
    assert error["node_id"] == number and error["exception_message"].strip().startswith(sentence)
    assert error["executed"] == []


def queued(server, prompt, until, seconds=120):
    """Queue it; its history entry, interrupted once `until` is true."""
    import time

    _, answer = server.post("/prompt", {"prompt": prompt})
    for _ in range(seconds * 10):
        if until is not None and until():
            server.post("/interrupt", {})
            until = None
        history = server.get(f"/history/{answer['prompt_id']}")
        if history:
            return history[answer["prompt_id"]]
        time.sleep(0.1)
    raise TimeoutError(server.text()[-3000:])


def test_a_cancelled_strip_goes_on(server):
    """The slices that were written stay as they are; the rest follows, and what comes out is what would have been."""
    prompt = workflow(server, "rolling_stream")
    [node] = [n for n in prompt.values() if n["class_type"] == "RollingStream"]
    node["inputs"].update(steps=3, length=1024, stretch=128, seed=99, filename_prefix="first/strip")
    folder = server.base / "output" / "first"

    def slices():
        return sorted(folder.glob("*/*.png"))

    entry = queued(server, prompt, until=lambda: len(slices()) > 1)
    assert "execution_interrupted" in [message[0] for message in entry["status"]["messages"]]
    written = {path: path.read_bytes() for path in slices()}
    assert 1 < len(written) < 8
    assert queued(server, prompt, None)["status"]["status_str"] == "success"
    assert len(slices()) == 8 and all(path.read_bytes() == data for path, data in written.items())
    assert sum(Image.open(path).width for path in slices()) == 1024
    assert "It goes on after" in server.text()
    node["inputs"]["filename_prefix"] = "second/strip"
    queued(server, prompt, None)
    again = sorted((server.base / "output" / "second").glob("*/*.png"))
    pictures = [[Image.open(path).convert("RGB").tobytes() for path in each] for each in (slices(), again)]
    assert pictures[0] == pictures[1]


@pytest.mark.parametrize("encode", ["VAEEncodeForInpaint", "SetLatentNoiseMask"])
def test_outpainting_as_comfyui_has_it(server, encode):
    """Pad Image for Outpainting, either way to the mask, and our sampler: the picture stays, the log says its share."""
    prompt = workflow(server, "rolling_image_to_image")
    Image.new("RGB", (256, 256), (90, 140, 210)).save(server.base / "input" / "example.png")
    one = {node["class_type"]: key for key, node in prompt.items()}
    pad = {"image": [one["ImageScale"], 0], "left": 0, "top": 0, "right": 0, "bottom": 128, "feathering": 0}
    prompt["pad"] = {"class_type": "ImagePadForOutpaint", "inputs": pad}
    vae = prompt[one["VAEEncode"]]["inputs"]["vae"]
    if encode == "VAEEncodeForInpaint":
        inputs = {"pixels": ["pad", 0], "vae": vae, "mask": ["pad", 1], "grow_mask_by": 8}
    else:
        prompt[one["VAEEncode"]]["inputs"]["pixels"] = ["pad", 0]
        inputs = {"samples": [one["VAEEncode"], 0], "mask": ["pad", 1]}
    prompt["mask"] = {"class_type": encode, "inputs": inputs}
    prompt[one[NODES[0]]]["inputs"].update(latent_image=["mask", 0], denoise=1.0, steps=3)
    [image] = pictures(server, server.run(prompt))
    assert image.size == (256, 384)
    assert "of the picture: it is seen, and not computed." in server.text()


def test_cancel_over_http(server):
    import time

    prompt = workflow(server, "rolling_tall_canvas")
    for node in prompt.values():
        if "steps" in node["inputs"]:
            node["inputs"].update(steps=500, seed=77)
    _, answer = server.post("/prompt", {"prompt": prompt})
    time.sleep(3)
    server.post("/interrupt", {})
    for _ in range(120):
        history = server.get(f"/history/{answer['prompt_id']}")
        if history:
            break
        time.sleep(0.25)
    messages = [message[0] for message in history[answer["prompt_id"]]["status"]["messages"]]
    assert "execution_interrupted" in messages
    assert server.get("/queue")["queue_running"] == []


def test_import_is_quick_and_pulls_in_no_diffusers(server):
    """In ComfyUI's own log: seconds of the pack's import; diffusers comes with the Flux-Dev node's first run only."""
    lines = [
        line for line in server.text().splitlines() if "seconds" in line and "autoregressive-rolling-diffusion" in line
    ]
    assert float(lines[0].split("seconds")[0].split()[-1]) < 3  # a second on a machine that has nothing else to do
    sources = [p.read_text(encoding="utf-8") for p in (PACK / "rolling_diffusion" / "comfy").glob("*.py")]
    assert not any(line.startswith(("import diffusers", "from diffusers")) for s in sources for line in s.splitlines())
