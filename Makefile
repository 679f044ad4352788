# make demo | test | lint | bench | test-comfyui, bench-comfyui COMFYUI_PATH=… | clean       (needs python3 >= 3.10, pip and make)

PYTHON ?= python3
# What pip installs as torch. A wheel, a file or a version of your own: make demo TORCH=torch==2.8.0
TORCH ?= torch==2.13.0
VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed
GENERATE := $(VENV)/bin/rolling-diffusion generate
DEMO_PROMPT := "a purple kite above a green house in daylight over green hills" --seed 0
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help venv install demo test lint format bench checkout test-comfyui bench-comfyui clean
.DELETE_ON_ERROR:

help:
	@sed -n 1p Makefile

venv: $(PY)
install: $(STAMP)

$(PY):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || { \
	  echo "Python 3.10 or newer is needed, but $(PYTHON) is $$($(PYTHON) --version 2>&1 || true): name another one with make PYTHON=python3.12." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV) || { $(PYTHON) -m venv --clear --without-pip $(VENV) && \
	  $(PYTHON) -m pip --python $(PY) install pip; }

# torch first, so that a range asked for by another package does not choose the build.
# k-diffusion without its dependencies: the tests run its samplers and need nothing else of it.
$(STAMP): pyproject.toml Makefile | $(PY)
	$(PY) -m pip install --quiet $(TORCH)
	$(PY) -m pip install --quiet -e '.[test,lint]'
	$(PY) -m pip install --quiet --no-deps k-diffusion==0.1.1.post1
	@touch $@

demo: $(STAMP)
	@mkdir -p out/demo
	$(GENERATE) $(DEMO_PROMPT) --order top-to-bottom -o out/demo/top-to-bottom.png --animation out/demo/top-to-bottom.gif
	$(GENERATE) $(DEMO_PROMPT) --order left-to-right -o out/demo/left-to-right.png
	$(GENERATE) $(DEMO_PROMPT) --order spiral-out -o out/demo/spiral-out.png
	@echo "The pictures are in $(CURDIR)/out/demo: top-to-bottom.png (.gif shows it appearing), left-to-right.png, spiral-out.png"

test: lint
	$(PY) -m pytest

lint: $(STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/pyright
	$(VENV)/bin/lint-imports

format: $(STAMP)
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

bench: $(STAMP)
	$(PY) -m benchmarks

# COMFYUI_PATH: a checkout of ComfyUI. COMFYUI_PYTHON: an interpreter with its requirements, ours, and pytest.
COMFYUI_PYTHON ?= $(PY)
checkout: $(STAMP)
	@test -f "$(COMFYUI_PATH)/main.py" || { \
	  echo "COMFYUI_PATH must name a ComfyUI checkout: make $(MAKECMDGOALS) COMFYUI_PATH=/path/to/ComfyUI" >&2; exit 2; }

test-comfyui: checkout
	COMFYUI_PATH="$(COMFYUI_PATH)" $(COMFYUI_PYTHON) -m pytest -rs --confcutdir=tests/comfyui tests/comfyui

bench-comfyui: checkout
	COMFYUI_PATH="$(COMFYUI_PATH)" $(COMFYUI_PYTHON) -m benchmarks.comfyui

clean:
	rm -rf out build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
