# `make test` and `make demo` need Python 3.11 or newer and this directory, nothing else.
PYTHON ?= python3
VENV := .venv
MINUTES ?= 10
READY := $(VENV)/.ready-$(shell cat pyproject.toml constraints.txt | cksum | cut -d' ' -f1)

.PHONY: test demo lint docs figures fuzz gpu engines install help

test: install  ## run the tests (the default)
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -q -n auto --dist worksteal

demo: install  ## fold the bundled model with three methods and draw demo/plot.png
	$(VENV)/bin/python scripts/demo.py

lint: install  ## ruff check, ruff format --check, mypy
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

figures: install  ## write the figures of README.md and docs/ from benchmarks/results/
	$(VENV)/bin/python scripts/figures.py

fuzz: install  ## run corrupted inputs, kills, races and full disks against the command line for MINUTES=10
	cd tests && $(abspath $(VENV))/bin/python -m hostile --minutes $(MINUTES)

gpu:  ## measure the CUDA GPU of this machine into benchmarks/results/gpu.json, in at most 9 minutes
	$(PYTHON) benchmarks/gpu.py

engines: install  ## run folds in the serving engines, each in an environment under build/engines
	$(VENV)/bin/python benchmarks/engine_environments.py

docs: install  ## check the figures, then build the documentation into site/
	$(VENV)/bin/python scripts/figures.py --check
	OMP_NUM_THREADS=1 NO_MKDOCS_2_WARNING=1 $(VENV)/bin/python -m mkdocs build --strict --quiet

help:  ## list the targets
	@sed -nE 's/^([a-z]+):.*  ## (.*)/  make \1\t\2/p' Makefile | expand -t 18

install: $(READY)  ## set up .venv

# The stamp is named for the contents of the two files, so a change of either installs anew and a touch does not.
$(READY):
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,plot,data,docs]'
	rm -f $(VENV)/.ready-*
	touch $@
