# Two commands do everything on a fresh machine, virtual environment included:
#
#   make quickstart    train, prune and fine-tune a small network on handwritten digits (CPU, about 3 minutes)
#   make test          all tests
#
# PYTHON=python3.12 picks the interpreter, VENV=/elsewhere the environment (an existing one is used as it is).
# What is installed is remembered in stamp files inside the environment, so a second call starts at once.

PYTHON ?= python3
VENV ?= .venv
TORCH := torch==2.11.0 torchvision==0.26.0 "triton==3.6.0; sys_platform == 'linux'"
# Workers of pytest.  More than four gain little; one thread each, so that they do not fight over the cores.
TEST_ARGS ?= -n auto --maxprocesses 4

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
BUILD_INPUTS := pyproject.toml setup.py $(wildcard csrc/*.* csrc/*/*.*)
say = @printf '\033[1m%s\033[0m\n' "$(1)"
fail = { printf '%s\n' "make: $(1)" >&2; exit 1; }

.PHONY: help install quickstart test lint docs format bench clean
.DELETE_ON_ERROR:

help:
	@printf '%s\n' 'make quickstart   install if needed, then train, prune and fine-tune on digits' \
	  'make test         install if needed, then run all tests' \
	  'make install      only the environment: $(VENV), torch, fastprune in editable form' \
	  'make lint         ruff, clang-format, import layering' \
	  'make docs         the pages of docs/ as a web site in build/docs; dead links and headings fail' \
	  'make format       let ruff and clang-format rewrite the sources' \
	  'make bench        CPU timings, interleaved against eager PyTorch (bench/README.md)' \
	  'make clean        remove what was built, .venv too'

quickstart: $(VENV)/.fastprune
	@$(BIN)/fastprune quickstart

test: $(VENV)/.fastprune
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(TEST_ARGS)

install: $(VENV)/.fastprune

$(BIN)/python:
	$(call say,Creating the virtual environment $(VENV))
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || $(call fail,fastprune needs Python 3.11 or newer; name one: make PYTHON=python3.12)
	@$(PYTHON) -m venv $(VENV) || $(call fail,could not create $(VENV); on Debian and Ubuntu: apt install python3-venv)

# The name carries the version: a new pin in this file installs anew, any other edit does not.
TORCH_STAMP := $(VENV)/.torch-2.11.0
$(TORCH_STAMP): | $(BIN)/python
	$(call say,Installing torch 2.11.0: up to 3 GB to download - some minutes the first time)
	@$(PIP) install $(TORCH) || $(call fail,pip could not install torch; see its message above)
	@$(PIP) install 'setuptools>=77,<82' wheel ninja || $(call fail,pip could not install the build tools; see above)
	@touch $@

$(VENV)/.fastprune: $(TORCH_STAMP) $(BUILD_INPUTS)
	$(call say,Building and installing fastprune: about a minute)
	@$(PIP) install --no-build-isolation -e '.[test]' || $(call fail,could not build or install fastprune; see above)
	@touch $@

# Needs no torch.  The versions are those of the "lint" extra in pyproject.toml.
$(VENV)/.lint: pyproject.toml | $(BIN)/python
	$(call say,Installing ruff and clang-format)
	@$(BIN)/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["lint"])' \
	  | xargs $(PIP) install pytest || $(call fail,pip could not install the lint tools; see its message above)
	@touch $@

CXX_SOURCES := $(wildcard $(foreach end,cpp cu h,csrc/*.$(end) csrc/*/*.$(end) tests/cuda_emulator/*.$(end)))
lint: $(VENV)/.lint
	@status=0; \
	$(BIN)/ruff check . || status=1; \
	$(BIN)/ruff format --check . || status=1; \
	$(BIN)/clang-format --dry-run -Werror $(CXX_SOURCES) || status=1; \
	$(BIN)/python -m pytest -q -c /dev/null --rootdir . --noconftest -p no:cacheprovider tests/test_layers.py || status=1; \
	exit $$status

# Needs no torch either.
$(VENV)/.docs: pyproject.toml | $(BIN)/python
	$(call say,Installing Sphinx)
	@$(BIN)/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"])' \
	  | xargs $(PIP) install || $(call fail,pip could not install Sphinx; see its message above)
	@touch $@

docs: $(VENV)/.docs
	@$(BIN)/python -m sphinx -q -W --keep-going -b html docs build/docs
	@echo 'build/docs/index.html'

format: $(VENV)/.lint
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .
	@$(BIN)/clang-format -i $(CXX_SOURCES)

bench: $(VENV)/.fastprune
	@$(BIN)/python -m bench.ops.batch_norm_act
	@$(BIN)/python -m bench.e2e.step

clean:
	rm -rf .venv build dist *.egg-info fastprune/_C*.so .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
