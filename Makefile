# `make test` and `make demo` need Python 3.11 or newer and this directory, nothing else.
PYTHON ?= python3
VENV := .venv
READY := $(VENV)/.ready-$(shell cat pyproject.toml constraints.txt | cksum | cut -d' ' -f1)

.PHONY: test demo lint install

test: install
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -q -n auto --dist worksteal

demo: install
	$(VENV)/bin/python scripts/demo.py

lint: install
	$(VENV)/bin/ruff check .

install: $(READY)

# The stamp is named for the contents of the two files, so a change of either installs anew and a touch does not.
$(READY):
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,plot,data]'
	rm -f $(VENV)/.ready-*
	touch $@
