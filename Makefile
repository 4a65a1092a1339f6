# Start with `make demo` and `make test`. Both create .venv on first use and reuse it afterwards.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
# One process per core. Tests that measure memory or load the machine share one process.
PARALLEL := -n auto --dist loadgroup
# On Linux, pip installs torch's CUDA build, unless torch is already installed.
INSTALLS := 2 to 5 minutes and about 1.5 GB, 6 GB with torch's CUDA build

.PHONY: demo test test-slow coverage test-lowest test-third-party docs build try-wheel try-core format clean

# Needs the commands and the digits, but no development tools. Takes about a minute after the installation.
demo: .venv/.demo-installed
	$(BIN)/python scripts/demo.py

.venv/.demo-installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "Installing torch, Lightning, Hydra and the digits into .venv, on first use only: $(INSTALLS)"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[data]"
	@echo ".venv takes $$(du -sh .venv | cut -f 1)"
	touch $@

test: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest -q $(PARALLEL) -m "not slow and not gpu"

# AT_MOST=40 skips tests that have not started after 40 minutes, and counts them.
test-slow: $(STAMP)
	$(BIN)/pytest -q $(PARALLEL) -m "(slow or hypothesis) and not gpu" $(AT_MOST:%=--at-most %)

# Branch coverage of the core with the fast tests.
coverage: $(STAMP)
	$(BIN)/pytest -q $(PARALLEL) -m "not slow and not gpu" --cov --cov-report term-missing

# Builds the documentation in site/. Warnings are errors.
docs: .venv/.docs-installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

.venv/.docs-installed: $(STAMP)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[docs]"
	touch $@

# Builds an sdist, and from it a wheel, in dist/, and checks both and their contents.
build: .venv/.release-installed
	rm -rf dist
	PIP_CONSTRAINT=$(CURDIR)/constraints.txt $(BIN)/python -m build
	$(BIN)/twine check --strict dist/*
	$(BIN)/python scripts/check_build.py dist

# Installs the wheel with the experiments extra in a fresh environment, then trains, evaluates and reports in another folder.
try-wheel: build
	$(BIN)/python scripts/try_wheel.py dist

# Installs the package without extras in a fresh environment. A model trains and resumes, and the commands name the missing extra.
try-core: $(STAMP)
	$(BIN)/python scripts/try_core.py

.venv/.release-installed: $(STAMP)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[release]"
	touch $@

# The tests with the lowest versions that pyproject.toml allows; TESTS="tests/cli tests/callbacks" runs some of them.
LOWEST := .venv-lowest
test-lowest: $(LOWEST)/.installed
	$(LOWEST)/bin/pytest -q $(PARALLEL) -m "not slow and not gpu" $(TESTS)

$(LOWEST)/.installed: pyproject.toml constraints-lowest.txt
	test -x $(LOWEST)/bin/python || $(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/python -m pip install --quiet --constraint constraints-lowest.txt --editable ".[dev]"
	touch $@

# Unchanged models of other packages with one line of ours; TESTS="-k BERT" runs some of them.
THIRD_PARTY := .venv-third-party
THIRD_PARTY_PACKAGES := transformers peft pytorch-lightning pytorch-forecasting scvi-tools chemprop neuromancer neuralforecast
test-third-party: $(THIRD_PARTY)/.installed
	$(THIRD_PARTY)/bin/pytest -q -m third_party tests/third_party $(TESTS)

$(THIRD_PARTY)/.installed: pyproject.toml constraints-third-party.txt
	test -x $(THIRD_PARTY)/bin/python || $(PYTHON) -m venv $(THIRD_PARTY)
	$(THIRD_PARTY)/bin/python -m pip install --quiet --constraint constraints-third-party.txt --editable . \
		pytest pytest-timeout hypothesis $(THIRD_PARTY_PACKAGES)
	touch $@

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Rebuilt only when the dependencies change. The package itself is installed in editable mode.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "Installing the package and everything that its tests need into .venv: $(INSTALLS), and as much again for the tests' packages"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $(STAMP)

clean:
	rm -rf .venv $(LOWEST) $(THIRD_PARTY) outputs dist site
