# Two commands for a newcomer: `make demo` and `make test`. Each makes its own virtual environment.
#
#   make demo                     train a small model on real text, then let it write (5 minutes)
#   make test                     the whole suite
#   make test PYTHON=python3.11   with another Python (3.11 or newer)
#   make test-fast                without the slow tests
#   make test-long                shipped configs compiled for their slices, runs of many processes
#   make lint                     ruff, as CI runs it
#   make lock                     record the versions that are installed now

SHELL := /bin/bash
.DEFAULT_GOAL := help

# The first of these that runs: version managers leave names on the PATH that do not.
PYTHON ?= python3.12 python3.13 python3.11 python3
FOUND := $(shell for name in $(PYTHON); do for path in $$(type -ap $$name); do \
  if $$path -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; \
  then echo $$path; exit; fi; done; done)
VERSION := $(if $(FOUND),$(shell $(FOUND) -c 'import sys; print("%d.%d" % sys.version_info[:2])'))

VENV := .venv/$(VERSION)
BIN := $(VENV)/bin
LOCK := $(wildcard requirements-$(VERSION).lock)
STAMP := $(VENV)/.installed
RUN := runs/demo
# A process for each core, but four at the most: each takes up to 3 GB.
PYTEST = $(BIN)/python -m pytest --numprocesses=auto --maxprocesses=4 --dist=worksteal

# Large pages for what a step allocates and frees: a fifth less processor time on Linux.
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1

help:
	@sed -n 's/^#   //p' $(MAKEFILE_LIST)

$(STAMP): setup.py $(LOCK)
	@test -n "$(FOUND)" || { echo "error: none of '$(PYTHON)' is a Python of 3.11 or newer with" \
	  "venv; install one, or name it: make $(MAKECMDGOALS) PYTHON=/path/to/python3.12"; exit 2; }
	@echo "Installing into $(VENV) with $(FOUND) (some minutes, once)"
	@test -x $(BIN)/python || $(FOUND) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --progress-bar=off --editable '.[test]' $(if $(LOCK),-c $(LOCK))
	@touch $@

install: $(STAMP)

demo: $(STAMP)
	@rm -rf $(RUN)
	$(BIN)/python -m llm_jax.train --config=configs/tiny.py --workdir=$(RUN)
	$(BIN)/python -m llm_jax.sampling --workdir=$(RUN) --prompts=configs/demo_prompts.txt \
	  --temperature=0.8 --top_p=0.95 --max_tokens=160

test: $(STAMP)
	$(PYTEST) -m 'not long'

test-fast: $(STAMP)
	$(PYTEST) -m 'not slow and not long'

test-long: $(STAMP)
	$(PYTEST) -m long

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

lock: $(STAMP)
	$(BIN)/python -m pip freeze --exclude-editable > requirements-$(VERSION).lock

clean:
	rm -rf .venv runs .pytest_cache

.PHONY: help install demo test test-fast test-long lint lock clean
