# Every target sets up what it needs: only Python >= 3.10 (tested with 3.11) and a network that pip can reach.
PYTHON ?= python3
PYTEST_ARGS ?=
VENV := $(or $(FLUX_HOTSWAP_VENV),.venv)
ifeq ($(OS),Windows_NT)
VENV_PYTHON := $(VENV)/Scripts/python.exe
else
VENV_PYTHON := $(VENV)/bin/python
endif

.PHONY: setup demo test lint clean

setup: ## install everything that the tests and the demo need
	$(PYTHON) -m harness.setup --for test

demo: ## run the demonstration on a real ComfyUI server
	$(PYTHON) -m harness.setup --for demo
	$(VENV_PYTHON) -m harness.demo

test: ## check the style, then run all tests (PYTEST_ARGS="-k name" narrows them)
	$(PYTHON) -m harness.setup --for test
	$(VENV_PYTHON) -m ruff check .
	$(VENV_PYTHON) -m pytest $(PYTEST_ARGS)

lint: ## check the style only
	$(PYTHON) -m harness.setup --for demo
	$(VENV_PYTHON) -m ruff check .

clean: ## remove what runs left behind; the environment stays, it takes minutes to build
	rm -rf .cache .pytest_cache .ruff_cache .hypothesis demo-output bench-output
	find . -name __pycache__ -type d -not -path './.venv/*' -prune -exec rm -rf {} +
	@echo "Kept $(VENV). To build it anew, delete it and run 'make setup'."
