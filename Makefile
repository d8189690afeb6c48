# make demo, make test, make lint, make types: each from nothing but Python 3.11 or later.
#   PYTHON=python3.12   the interpreter that .venv is made of
#   ARGS="-k noise"     more arguments for pytest or the demo

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
# setuptools comes with torch, so the project itself is built without another download.
INSTALL := $(RUN) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
PROJECT := $(INSTALL) --no-build-isolation --editable

.DELETE_ON_ERROR:
.PHONY: demo test lint types clean

demo: $(VENV)/.demo
	$(RUN) examples/demo_docstrings.py $(ARGS)

test: $(VENV)/.dev
	$(RUN) -m pytest -n auto --dist loadgroup $(ARGS)

lint: $(VENV)/.dev
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

# On an installed copy, because callbacks/ and hf_integration/ are packages of zo_lightning only there.
types: $(VENV)/.dev
	rm -rf build/lib build/typing
	$(RUN) -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --target build/typing .
	cd build/typing && ../../$(RUN) -m mypy --config-file ../../pyproject.toml --cache-dir ../../.mypy_cache \
	  zo_lightning $(addprefix ../../,$(shell find examples benchmarks -name '*.py'))

clean:
	rm -rf $(VENV) build dist *.egg-info

$(VENV)/pyvenv.cfg:
	@$(PYTHON) -c "import sys; sys.exit('Python 3.11 or later is needed: make PYTHON=...' if sys.version_info < (3, 11) else 0)"
	$(PYTHON) -m venv $(VENV)

# torch alone and first: another package that pulled it in could choose a different build.
$(VENV)/.torch: constraints.txt | $(VENV)/pyvenv.cfg
	@echo "Installing into $(VENV): some minutes, once."
	$(INSTALL) torch setuptools
	@touch $@

$(VENV)/.demo: $(VENV)/.torch pyproject.toml
	$(PROJECT) '.[demo]'
	@touch $@

$(VENV)/.dev: $(VENV)/.torch pyproject.toml
	$(PROJECT) '.[dev]'
	@touch $@
