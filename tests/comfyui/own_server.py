"""A ComfyUI server of its own with a copy of the pack, over HTTP. (ComfyUI itself has a module named server.)"""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

PACK = Path(__file__).resolve().parents[2]
SHIPPED = ("__init__.py", "pyproject.toml", "rolling_diffusion", "web", "locales", "example_workflows", "subgraphs")


class Server:
    """Start with a base folder; the embedded model is a random one of its shape where the real one is not there."""

    def __init__(self, base, comfyui):
        self.base, self.port = Path(base), _free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.pack = "autoregressive-rolling-diffusion"
        pack = self.base / "custom_nodes" / self.pack
        pack.mkdir(parents=True)
        for name in SHIPPED:
            source = PACK / name
            copy = shutil.copytree if source.is_dir() else shutil.copy
            copy(source, pack / name)
        self.real = (pack / "rolling_diffusion" / "embedded" / "model_index.json").is_file()
        if not self.real:
            import tiny_folder

            tiny_folder.make(pack / "rolling_diffusion" / "embedded")
        self.log = open(self.base / "server.log", "w")  # noqa: SIM115
        command = [sys.executable, "main.py", "--cpu", "--port", str(self.port), "--base-directory", str(self.base),
                   "--disable-all-custom-nodes", "--whitelist-custom-nodes", pack.name, "--disable-api-nodes",
                   "--database-url", "sqlite:///:memory:", "--preview-method", "latent2rgb"]  # fmt: skip
        env = {**os.environ, "HF_HUB_OFFLINE": "1"}
        self.process = subprocess.Popen(command, cwd=comfyui, env=env, stdout=self.log, stderr=subprocess.STDOUT)
        for _ in range(1800):  # a quarter of an hour: the machine may have much else to do
            try:
                self.get("/system_stats")
                return
            except (urllib.error.URLError, ConnectionError):
                assert self.process.poll() is None, self.text()[-3000:]
                time.sleep(0.5)
        self.process.kill()
        raise TimeoutError(self.text()[-3000:])

    def stop(self):
        self.process.terminate()
        self.process.wait(20)
        self.log.close()

    def text(self):
        return (self.base / "server.log").read_text(errors="replace")

    def get(self, path):
        with urllib.request.urlopen(self.url + path) as answer:
            data = answer.read()
        return json.loads(data) if answer.headers.get_content_type() == "application/json" else data

    def post(self, path, body):
        """(status, answer)"""
        request = urllib.request.Request(
            self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request) as answer:
                data = answer.read()
                return answer.status, json.loads(data) if data else None
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read())

    def run(self, prompt, seconds=300):
        """Queue an API prompt and wait: its history entry."""
        status, answer = self.post("/prompt", {"prompt": prompt})
        assert status == 200, answer
        for _ in range(seconds * 4):
            history = self.get(f"/history/{answer['prompt_id']}")
            if history:
                return history[answer["prompt_id"]]
            time.sleep(0.25)
        raise TimeoutError(self.text()[-3000:])

    def blueprints(self):
        """The pack's blueprints, number by name; None where this ComfyUI has none."""
        try:
            listed = self.get("/global_subgraphs")
        except urllib.error.HTTPError:
            return None
        return {e["name"]: n for n, e in listed.items() if e["info"]["node_pack"].endswith(f".{self.pack}")}

    def api(self, workflow):
        """The API prompt of a workflow in the page's format, as the page would make it."""
        info = self.get("/object_info")
        links = {link[0]: (str(link[1]), link[2]) for link in workflow["links"]}
        prompt = {}
        for node in workflow["nodes"]:
            if node["type"] == "MarkdownNote":
                continue
            inputs, values = {}, list(node["widgets_values"])
            spec = info[node["type"]]["input"]
            for name, kind in {**spec.get("required", {}), **spec.get("optional", {})}.items():
                options = kind[1] if len(kind) > 1 else {}
                if isinstance(kind[0], list) or kind[0] in ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"):
                    if not values:  # an input that is newer than the workflow: the page takes its default
                        continue
                    inputs[name] = values.pop(0)
                    if options.get("control_after_generate") or options.get("image_upload"):
                        values.pop(0)
            assert not values, f"{node['type']} has widgets that the node does not know: {values}"
            for socket_ in node["inputs"]:
                if socket_["link"] is not None:
                    inputs[socket_["name"]] = list(links[socket_["link"]])
            prompt[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
        return prompt


def _free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]
