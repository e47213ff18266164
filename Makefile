# make run · make test · make lab: each sets up what it needs, from requirements.lock.

# The newest Python that this is made for, and that really runs; PYTHON=... takes another.
FITS := import sys, venv; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))
PYTHON ?= $(shell for name in python3.14 python3.13 python3.12 python3.11 python3 python; do \
	if "$$name" -c '$(FITS)' 2>/dev/null; then "$$name" -c 'import sys; print(sys.executable)'; \
	break; fi; done)
# uv, where it is there, does in seconds what takes pip minutes; and fetches a Python if need be.
UV := $(if $(shell uv --version 2>/dev/null),uv)
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

.PHONY: run test test-binder test-lab lab site lint links lock floors train bench clean help

help: ## List what make can do
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 14

# The notebooks take trained networks and retraining's outcomes from prunelib/runs;
# FULL=1 makes those again first. What agrees with the committed outputs stays as it is.
run: $(VENV)/.installed $(if $(FULL),train) ## Execute all notebooks in place, two at a time, and draw every figure again; FULL=1 trains first
	$(VENV)/bin/python scripts/run_notebooks.py
	$(VENV)/bin/python scripts/make_links.py

# The stored outputs are of the JAX that the lock has for Python 3.12 and later.
test: $(VENV)/.installed ## Test prunelib and the project, then run every notebook and its solutions, and compare
	$(VENV)/bin/python -m pytest $(PARALLEL) worksteal tests
ifeq ($(NOTEBOOKS),)
	@echo "NO NOTEBOOKS: notebooks/NN-*.ipynb matches nothing, so no stored output was compared." >&2
else
	@if $(VENV)/bin/python -c 'import sys; sys.exit(sys.version_info >= (3, 12))'; then \
		echo "Python 3.11 has an older JAX: the notebooks are not compared." >&2; else \
	$(VENV)/bin/python scripts/with_solutions.py build/notebooks && \
	$(VENV)/bin/python -m pytest $(PARALLEL) loadfile $(NBVAL) \
		$(LONGEST_FIRST:%=build/%) $(NOTEBOOKS:%=build/%); fi
endif

test-binder: $(VENV)/.installed ## Install what Binder would, in an empty environment, and use it (slow)
	$(VENV)/bin/python -m pytest -m slow tests/test_project.py

test-lab: $(VENV)/.installed $(LAB_VENV)/.installed ## Run notebooks in the real JupyterLab, in a headless Chromium (minutes)
	LAB=$(VENV)/bin/python $(LAB_VENV)/bin/python -m pytest --noconftest -rs tests/lab

lab: $(VENV)/.installed ## Open JupyterLab at the first notebook
	$(VENV)/bin/python -m jupyterlab $(firstword $(NOTEBOOKS))

site: $(VENV)/.installed ## Build the series as pages to read, build/site, from the stored outputs (needs npm)
	$(VENV)/bin/python scripts/make_site.py

lint: $(VENV)/.installed ## Check the code and the notebooks with ruff; list numbers that only the prose has
	$(VENV)/bin/ruff check .
	$(VENV)/bin/python scripts/prose_numbers.py

links: $(VENV)/.installed ## Write README.md's links and its table of lessons, each notebook's badges and first cell
	$(VENV)/bin/python scripts/make_links.py

train: $(VENV)/.installed ## Train and prune again what prunelib/runs holds (about seven hours)
	$(VENV)/bin/python -m prunelib.experiments

bench: $(BENCH_VENV)/.installed ## Time prunelib against other libraries, in an environment of its own
	$(BENCH_VENV)/bin/python -m pytest -p no:xdist -W default --benchmark-columns=min,median,iqr,rounds benchmarks

lock: ## Resolve requirements.lock again, to the newest versions that pyproject.toml allows
	$(call environment,.venv-lock)
	$(call install,.venv-lock) uv
	.venv-lock/bin/uv pip compile pyproject.toml --all-extras --upgrade --universal \
		--python-version 3.11 --generate-hashes --no-annotate --no-config --no-emit-index-url \
		--quiet --custom-compile-command "make lock" --output-file requirements.lock

floors: ## Use and test prunelib with the oldest versions that pyproject.toml allows; PYTHON=python3.11 for the oldest of all
	$(call environment,.venv-floors)
	$(call install,.venv-floors) uv
	mkdir -p build
	.venv-floors/bin/uv pip compile --quiet --no-config --resolution lowest-direct \
		--all-extras --python .venv-floors/bin/python pyproject.toml --output-file build/floors.txt
	.venv-floors/bin/uv pip install --quiet --python .venv-floors/bin/python -r build/floors.txt
	sed -n '/^```python/,/^```/{/^```/!p;}' README.md > build/readme.py
	PYTHONPATH=. .venv-floors/bin/python -W error build/readme.py
	.venv-floors/bin/python -m pytest -p no:xdist tests/test_data.py tests/test_pruning.py tests/test_figures.py

clean: ## Remove the environments
	rm -rf $(VENV) $(BENCH_VENV) $(LAB_VENV) .venv-lock .venv-floors

# $(call environment,FOLDER) makes an empty one; $(call install,FOLDER) installs into it.
define environment
	@if [ -z "$(PYTHON)$(UV)" ]; then echo "This needs Python 3.11 to 3.14 with its module \
	venv (Debian and Ubuntu: apt install python3-venv), or uv, which fetches a Python. If yours is not \
	on the PATH: make PYTHON=/where/it/is/python3" >&2; exit 1; fi
	$(if $(UV),uv venv --quiet --clear --seed --python "$(or $(PYTHON),3.13)" $(1),"$(PYTHON)" -m venv --clear $(1))
endef
install = $(if $(UV),uv pip install --quiet --python $(1)/bin/python,$(1)/bin/python -m pip install --quiet)

# The stamps are written last, so an interrupted set-up starts over.
$(VENV)/.locked: requirements.lock
	@echo "Setting up $(VENV) from requirements.lock: a few minutes, once."
	$(call environment,$(VENV))
	$(call install,$(VENV)) --require-hashes -r requirements.lock
	touch $@

# prunelib is installed as it stands here, so that notebooks in any folder find it; and once more
# after a clone was moved. (setuptools would warn that a folder of that name is here.)
$(VENV)/.installed: $(VENV)/.locked pyproject.toml
	PYTHONWARNINGS=ignore $(VENV)/bin/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	echo "$(CURDIR)" > $@
ifneq ($(shell cat $(VENV)/.installed 2>/dev/null),$(CURDIR))
.PHONY: $(VENV)/.installed
endif

$(BENCH_VENV)/.installed: requirements.lock pyproject.toml
	@echo "Setting up $(BENCH_VENV): a few minutes, once."
	$(call environment,$(BENCH_VENV))
	$(call install,$(BENCH_VENV)) --require-hashes -r requirements.lock
	$(BENCH_VENV)/bin/python -m pip install --quiet --upgrade "pip>=25.1" # the first to know groups
	$(BENCH_VENV)/bin/python -m pip install --quiet --group torch
	$(BENCH_VENV)/bin/python -m pip install --quiet --no-deps --group bench
	touch $@

# Drives a browser that is already there; nothing downloads one.
$(LAB_VENV)/.installed: tests/lab/requirements.txt
	$(call environment,$(LAB_VENV))
	$(call install,$(LAB_VENV)) -r tests/lab/requirements.txt
	touch $@
