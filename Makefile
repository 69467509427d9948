# Every target sets up what it needs: only Python >= 3.10 (tested with 3.11) and a network that pip can reach.
PYTHON ?= python3
PYTEST_ARGS ?=
# How many test files run at once. Each is mostly one core's work, and takes some 3 GB with its ComfyUI server.
WORKERS ?= 2
# A version of torch other than the tested one gets an environment of its own, by torch and Python:
# make test TORCH=2.11.0 PYTHON=python3.12
TORCH ?=
ifneq ($(TORCH),)
SUFFIX := -torch-$(TORCH)-py$(shell $(PYTHON) -c "import sys; print('%d.%d' % sys.version_info[:2])")
endif
VENV := $(or $(FLUX_HOTSWAP_VENV),.venv$(SUFFIX))
export FLUX_HOTSWAP_VENV := $(VENV)
SETUP := $(PYTHON) -m harness.setup $(addprefix --torch ,$(TORCH))
ifeq ($(OS),Windows_NT)
VENV_PYTHON := $(VENV)/Scripts/python.exe
else
VENV_PYTHON := $(VENV)/bin/python
endif

# Types are those of the tested torch; another one's differ.
CHECK = $(VENV_PYTHON) -m ruff check . $(if $(TORCH),,&& $(VENV_PYTHON) -m mypy)

.PHONY: setup demo test test-fast lint clean

setup: ## install everything that the tests and the demo need
	$(SETUP) --for test

demo: ## run the demonstration on a real ComfyUI server
	$(SETUP) --for demo
	$(VENV_PYTHON) -m harness.demo

test: ## check style and types, then run all tests (PYTEST_ARGS="-k name" narrows them)
	$(SETUP) --for test
	$(CHECK)
	$(VENV_PYTHON) -m pytest -n $(WORKERS) --dist loadfile $(PYTEST_ARGS)

test-fast: ## run the tests that start no server and no process and compile nothing: under 4 minutes, while you work
	$(SETUP) --for test
	$(VENV_PYTHON) -m pytest -n $(WORKERS) --dist loadfile -m "not slow" $(PYTEST_ARGS)

lint: ## check style and types only
	$(SETUP) --for demo
	$(CHECK)

clean: ## remove what runs left behind; the environments stay, they take minutes to build
	rm -rf .cache .pytest_cache .ruff_cache .mypy_cache .hypothesis demo-output bench-output
	find . -name __pycache__ -type d -not -path './.venv*' -prune -exec rm -rf {} +
	@echo "Kept $(wildcard .venv .venv-*) $(FLUX_HOTSWAP_VENV). To build one anew, delete it and run 'make setup'."
