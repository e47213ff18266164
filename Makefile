# make run · make test · make lab: each sets up what it needs, from requirements.lock.

PYTHON ?= python3.11
VENV ?= .venv
BENCH_VENV ?= .venv-bench
LAB_VENV ?= .venv-lab
NOTEBOOKS := $(sort $(wildcard notebooks/[0-9][0-9]-*.ipynb))
# Two processes, for the two cores of the smallest machine that this is meant for. The notebooks
# that took longest start first, so that both processes end at about the same time.
PARALLEL := -n 2 --no-loadscope-reorder --dist
MEASURED = $(shell grep -s '^[0-9]' notebooks/measured.csv | sort -t, -k2 -rn | cut -d, -f1)
LONGEST_FIRST = $(filter $(NOTEBOOKS),$(MEASURED:%=notebooks/%.ipynb))
NBVAL := --nbval --nbval-sanitize-with tests/nbval_sanitize.cfg \
	--nbval-cell-timeout=1200 --nbval-kernel-startup-timeout=120

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: run test test-binder test-lab lab lint links lock train bench clean help

help: ## List what make can do
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 14

# The notebooks take trained networks and retraining's outcomes from prunelib/runs;
# FULL=1 makes those again first. What agrees with the committed outputs stays as it is.
run: $(VENV)/.installed $(if $(FULL),train) ## Execute all notebooks in place, two at a time, and draw every figure again; FULL=1 trains first
	$(VENV)/bin/python scripts/run_notebooks.py
	$(VENV)/bin/python scripts/make_links.py

test: $(VENV)/.installed ## Test prunelib and the project, then run every notebook and its solutions, and compare
	$(VENV)/bin/python -m pytest $(PARALLEL) worksteal tests
ifeq ($(NOTEBOOKS),)
	@echo "NO NOTEBOOKS: notebooks/NN-*.ipynb matches nothing, so no stored output was compared." >&2
else
	$(VENV)/bin/python scripts/with_solutions.py build/notebooks
	$(VENV)/bin/python -m pytest $(PARALLEL) loadfile $(NBVAL) \
		$(LONGEST_FIRST:%=build/%) $(NOTEBOOKS:%=build/%)
endif

test-binder: $(VENV)/.installed ## Install what Binder would, in an empty environment, and use it (slow)
	$(VENV)/bin/python -m pytest -m slow tests/test_project.py

test-lab: $(VENV)/.installed $(LAB_VENV)/.installed ## Run notebooks in the real JupyterLab, in a headless Chromium (minutes)
	LAB=$(abspath $(VENV)/bin/jupyter) $(LAB_VENV)/bin/python -m pytest --noconftest -rs tests/lab

lab: $(VENV)/.installed ## Open JupyterLab at the first notebook
	$(VENV)/bin/python -m jupyterlab $(firstword $(NOTEBOOKS))

lint: $(VENV)/.installed ## Check the code and the notebooks with ruff; list numbers that only the prose has
	$(VENV)/bin/ruff check .
	$(VENV)/bin/python scripts/prose_numbers.py

links: $(VENV)/.installed ## Write README.md's links and its table of lessons
	$(VENV)/bin/python scripts/make_links.py

train: $(VENV)/.installed ## Train and prune again what prunelib/runs holds (an hour or two)
	$(VENV)/bin/python -m prunelib.experiments

bench: $(BENCH_VENV)/.installed ## Time prunelib against other libraries, in an environment of its own
	$(BENCH_VENV)/bin/python -m pytest -p no:xdist -W default --benchmark-columns=min,median,iqr,rounds benchmarks

lock: ## Resolve requirements.lock again, to the newest versions that pyproject.toml allows
	$(PYTHON) -m venv --clear .venv-lock
	.venv-lock/bin/pip install --quiet uv
	.venv-lock/bin/uv pip compile pyproject.toml --all-extras --upgrade --universal \
		--python-version 3.11 --generate-hashes --no-annotate --no-config --no-emit-index-url \
		--quiet --custom-compile-command "make lock" --output-file requirements.lock

clean: ## Remove the environments
	rm -rf $(VENV) $(BENCH_VENV) $(LAB_VENV) .venv-lock

# The stamp is written last, so an interrupted set-up starts over. prunelib itself is not installed:
# the notebooks reach it through the link notebooks/prunelib, all else runs from this folder.
$(VENV)/.installed: requirements.lock
	@echo "Setting up $(VENV) from requirements.lock: a few minutes, once."
	$(PYTHON) -m venv --clear $(VENV)
	$(VENV)/bin/pip install --quiet --require-hashes -r requirements.lock
	touch $@

$(BENCH_VENV)/.installed: requirements.lock pyproject.toml
	@echo "Setting up $(BENCH_VENV): a few minutes, once."
	$(PYTHON) -m venv --clear $(BENCH_VENV)
	$(BENCH_VENV)/bin/pip install --quiet --require-hashes -r requirements.lock
	$(BENCH_VENV)/bin/pip install --quiet --upgrade "pip>=25.1" # the first to know groups
	$(BENCH_VENV)/bin/pip install --quiet --group torch
	$(BENCH_VENV)/bin/pip install --quiet --no-deps --group bench
	touch $@

# Drives a browser that is already there; nothing downloads one.
$(LAB_VENV)/.installed: tests/lab/requirements.txt
	$(PYTHON) -m venv --clear $(LAB_VENV)
	$(LAB_VENV)/bin/pip install --quiet -r tests/lab/requirements.txt
	touch $@
