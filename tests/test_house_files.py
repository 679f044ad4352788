"""The house keeps its own books straight: versions, requirements, the commands of the Makefile."""

import re
import subprocess
from pathlib import Path

import rolling_diffusion

ROOT = Path(__file__).parent.parent
PYPROJECT = (ROOT / "pyproject.toml").read_text()


def listed(text: str) -> set[str]:
    """Requirement lines, without the comments and torch, which ComfyUI brings itself."""
    return {line for line in text.splitlines() if line and not line.startswith(("#", "torch"))}


def test_one_version_everywhere():
    assert f'version = "{rolling_diffusion.__version__}"' in PYPROJECT
    assert f"## {rolling_diffusion.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_requirements_are_those_of_the_package():
    block = re.search(r"^dependencies = \[\n(.*?)^\]", PYPROJECT, re.S | re.M)
    assert block is not None
    assert listed("\n".join(re.findall(r'"(.+?)"', block[1]))) == listed((ROOT / "requirements.txt").read_text())


def test_every_requirement_has_a_floor_and_the_lowest_torch_is_it():
    block = re.search(r"^dependencies = \[\n(.*?)^\]", PYPROJECT, re.S | re.M)
    assert block is not None
    requirements = re.findall(r'"(.+?)"', block[1])
    assert all(re.fullmatch(r"[a-z]+>=[\d.]+", name) for name in requirements), requirements
    torch = next(name for name in requirements if name.startswith("torch")).replace(">=", "==")
    assert f"LOWEST_TORCH ?= {torch}.0\n" in (ROOT / "Makefile").read_text()


def test_types_ship_and_so_does_all_that_a_source_release_names():
    assert (Path(rolling_diffusion.__file__).parent / "py.typed").is_file()
    block = re.search(r"only-include = \[\n(.*?)^\]", PYPROJECT, re.S | re.M)
    assert block is not None
    named = re.findall(r'"(.+?)"', block[1])
    assert {"tests", "Makefile", "benchmarks", "requirements.txt"} <= set(named)
    assert all((ROOT / name).exists() for name in named)


def test_no_requirement_is_pinned():
    assert "==" not in (ROOT / "requirements.txt").read_text()


def test_an_old_python_gets_one_sentence(tmp_path):
    old = tmp_path / "python3.8"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo "Python 3.8.1" && exit 0\nexit 1\n')
    old.chmod(0o755)
    done = subprocess.run(
        ["make", "-s", "venv", f"PYTHON={old}", f"VENV={tmp_path / 'venv'}"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode != 0
    assert done.stderr.splitlines()[0].startswith("Python 3.10 or newer is needed")
    assert "Python 3.8.1" in done.stderr


def test_comfyui_tests_ask_for_a_checkout():
    done = subprocess.run(["make", "-sn", "test-comfyui"], cwd=ROOT, capture_output=True, text=True)
    assert "COMFYUI_PATH must name a ComfyUI checkout" in done.stdout
