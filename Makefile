# Two commands a newcomer needs: `make demo` and `make test`. Both make .venv on first use and reuse it afterwards.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
# One process per core; tests that measure memory or load the machine themselves share one.
PARALLEL := -n auto --dist loadgroup
# On Linux pip brings torch's CUDA build, unless torch is there already.
INSTALLS := 2 to 5 minutes and about 1.5 GB, 6 GB with torch's CUDA build

.PHONY: demo test test-slow coverage test-lowest test-third-party docs build try-wheel try-core format clean

# Needs the commands and the digits, no development tools; about a minute once they are installed.
demo: .venv/.demo-installed
	$(BIN)/python scripts/demo.py

.venv/.demo-installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "Installing torch, Lightning, Hydra and the digits into .venv, on first use only: $(INSTALLS)"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[data]"
	@du -sh .venv | sed 's/\t/ are in /'
	touch $@

test: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest -q $(PARALLEL) -m "not slow and not gpu"

# AT_MOST=40 skips what is not reached after 40 minutes, and counts it.
test-slow: $(STAMP)
	$(BIN)/pytest -q $(PARALLEL) -m "(slow or hypothesis) and not gpu" $(AT_MOST:%=--at-most %)

# Branch coverage of the core by the fast set.
coverage: $(STAMP)
	$(BIN)/pytest -q $(PARALLEL) -m "not slow and not gpu" --cov --cov-report term-missing

# The documentation site, in site/; a warning is an error.
docs: .venv/.docs-installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

.venv/.docs-installed: $(STAMP)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[docs]"
	touch $@

# Wheel and sdist in dist/, the wheel made from the sdist; checked, and what is in them.
build: .venv/.release-installed
	rm -rf dist
	PIP_CONSTRAINT=$(CURDIR)/constraints.txt $(BIN)/python -m build
	$(BIN)/twine check --strict dist/*
	$(BIN)/python scripts/check_build.py dist

# The wheel with the experiments extra, in an environment and a folder of its own: it trains, evaluates and reports.
try-wheel: build
	$(BIN)/python scripts/try_wheel.py dist

# The package without extras, in an environment of its own: a model trains and resumes; the commands say what to install.
try-core: $(STAMP)
	$(BIN)/python scripts/try_core.py

.venv/.release-installed: $(STAMP)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[release]"
	touch $@

# The tests with the lowest versions that pyproject.toml promises; TESTS="tests/cli tests/callbacks" for some of them.
LOWEST := .venv-lowest
test-lowest: $(LOWEST)/.installed
	$(LOWEST)/bin/pytest -q $(PARALLEL) -m "not slow and not gpu" $(TESTS)

$(LOWEST)/.installed: pyproject.toml constraints-lowest.txt
	test -x $(LOWEST)/bin/python || $(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/python -m pip install --quiet --constraint constraints-lowest.txt --editable ".[dev]"
	touch $@

# Models of other packages, unchanged, with one line of ours; TESTS="-k BERT" for some of them.
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

# Re-made only when the dependencies change; the package itself is installed editable.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "Installing the package and all that its tests need into .venv: $(INSTALLS), and as much again for the tests' packages"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $(STAMP)

clean:
	rm -rf .venv $(LOWEST) $(THIRD_PARTY) outputs dist site
