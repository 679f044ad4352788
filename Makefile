# make demo | test | test-lowest | lint | bench | test-comfyui, bench-comfyui COMFYUI_PATH=… | clean   (needs python3 >= 3.10, pip, make)

PYTHON ?= python3
# What pip installs as torch. A wheel, a file or a version of your own: make demo TORCH=torch==2.8.0
TORCH ?= torch==2.13.0
VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed
GENERATE := $(VENV)/bin/rolling-diffusion generate
DEMO_PROMPT := "a purple kite above a green house in daylight over green hills" --seed 0
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help venv install demo test test-lowest lint format bench checkout test-comfyui bench-comfyui clean
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
	$(VENV)/bin/rolling-diffusion stream --prompts docs/strip.txt --across 128 --stretch 128 --seed 3 -o out/demo/strip.png
	@echo "The pictures are in $(CURDIR)/out/demo: top-to-bottom.png (.gif shows it appearing), left-to-right.png, spiral-out.png, strip.png"

# A process a core, of one thread each.
PROCESSES ?= $(shell getconf _NPROCESSORS_ONLN)
test: lint
	OMP_NUM_THREADS=1 $(PY) -m pytest -n $(PROCESSES) --dist worksteal

# The suite's core on the lowest versions that pyproject.toml admits, in an environment made anew (uv, from pip, can choose
# those; where an old release has no wheel for this Python, the next one that has). The oldest of all:
# make test-lowest LOWEST_PYTHON=python3.10
LOWEST := .venv-lowest
LOWEST_PYTHON ?= $(PYTHON)
LOWEST_TORCH ?= torch==2.5.0
CORE = $(filter-out tests/test_house_% tests/test_train.py tests/test_benchmarks.py,$(sort $(wildcard tests/test_*.py)))
INTO_LOWEST = $(VENV)/bin/uv pip install --quiet --python $(LOWEST)
test-lowest: $(PY)
	$(PY) -m pip install --quiet uv
	$(VENV)/bin/uv venv --quiet --clear --python $(LOWEST_PYTHON) $(LOWEST)
	$(INTO_LOWEST) $(LOWEST_TORCH)
	$(INTO_LOWEST) --no-build --resolution lowest-direct -e '.[test]'
	$(INTO_LOWEST) --no-deps k-diffusion==0.1.1.post1
	$(VENV)/bin/uv pip list --python $(LOWEST)
	$(LOWEST)/bin/python -m pytest -rs $(CORE)

lint: $(STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/pyright
	$(VENV)/bin/lint-imports
	$(VENV)/bin/bandit -q -ll --skip B615 -r rolling_diffusion  # B615: the files of a model are its user's choice

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
	find . -name __pycache__ -not -path './.venv*/*' -prune -exec rm -rf {} +
