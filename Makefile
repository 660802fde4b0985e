# Two commands do everything on a machine with Python 3.11 and make: `make demo` and `make test`.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
DOCUMENTING := $(VENV)/.documenting
HOSTS := .venv-hosts
LOWEST := .venv-lowest

.PHONY: demo test test-hosts test-lowest lint docs bench campaign clean

# Python compiles what is imported when it is, and keeps it; pip would compile all that is there, for half of its time.
# Where the environment forbids to keep it, every process of the tests would compile torch anew.
unexport PYTHONDONTWRITEBYTECODE

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: $(INSTALLED)
	PATH="$(CURDIR)/$(BIN):$$PATH" bash examples/demo.sh

test: $(INSTALLED)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pytest -n auto --dist worksteal

# The host trainers' own environment. They come without what they declare, most of which their checkpointing does not import.
$(HOSTS)/.installed: pyproject.toml constraints-hosts.txt
	$(PYTHON) -m venv $(HOSTS)
	$(HOSTS)/bin/python -m pip install --quiet --no-compile --constraint constraints-hosts.txt --editable . transformers tyro pytest pytest-timeout
	$(HOSTS)/bin/python -m pip install --quiet --no-compile --constraint constraints-hosts.txt --no-deps nemo-automodel torchtitan
	touch $@

test-hosts: $(HOSTS)/.installed
	$(HOSTS)/bin/python -m pytest tests_hosts

# The oldest versions that pyproject.toml claims, torch apart; of the hub's client the oldest that transformers takes, and then the oldest.
$(LOWEST)/.installed: pyproject.toml .ci/lowest.py
	$(PYTHON) -m venv $(LOWEST)
	$(PYTHON) .ci/lowest.py > $(LOWEST)/oldest.txt
	(grep -v huggingface_hub $(LOWEST)/oldest.txt; grep ^torch== constraints.txt) > $(LOWEST)/together.txt
	$(LOWEST)/bin/python -m pip install --quiet --no-compile --constraint $(LOWEST)/together.txt --editable '.[dev]'
	touch $@

test-lowest: $(LOWEST)/.installed
	PATH="$(CURDIR)/$(LOWEST)/bin:$$PATH" $(LOWEST)/bin/python -m pytest -n auto
	$(LOWEST)/bin/python -m pip install --quiet --no-compile --target $(LOWEST)/hub --constraint $(LOWEST)/oldest.txt huggingface_hub
	PYTHONPATH="$(CURDIR)/$(LOWEST)/hub" $(LOWEST)/bin/python -m pytest tests/tensors/test_checkpoint.py -k hub

lint: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# Once: while pip installs the package anew, nothing can import it.
$(DOCUMENTING): $(INSTALLED)
	$(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt --editable '.[docs]'
	touch $@

# What is made together with them waits for that.
lint demo: | $(if $(filter docs,$(MAKECMDGOALS)),$(DOCUMENTING))

# A link, or a name in a docstring, that leads nowhere is an error.
docs: $(DOCUMENTING)
	$(BIN)/python -m sphinx --quiet --fail-on-warning --keep-going --fresh-env --conf-dir docs . docs/_site

bench: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt --editable '.[bench]'
	$(BIN)/python -m benchmarks

# How much, and of what: `make campaign SIZES="--kills 100 --only kills,disks"`; --help lists all. In the end, all tests
# with every case.
campaign: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt --editable '.[campaign]'
	$(BIN)/python -m tests.campaign $(SIZES)

clean:
	rm -rf $(VENV) $(HOSTS) $(LOWEST) demo docs/_site
