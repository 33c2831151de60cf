# `make demo` and `make test` work in a fresh clone with nothing but python3 (3.11 or later) present.
PYTHON ?= python3
VENV ?= .venv
STAMP := $(VENV)/.installed
# The pip that comes with Python 3.11 takes 1.7 times as long to install the same pins.
PIP_VERSION := 26.3
# A download that breaks off goes on where it stopped (pip 25.1 or later; by default five times for each file); one that
# cannot is begun once more. $(call pip_install,ENVIRONMENT,ARGUMENTS)
export PIP_RETRIES ?= 10
export PIP_RESUME_RETRIES ?= 50
pip_once = $(1)/bin/python -m pip install -qq --disable-pip-version-check --no-compile $(2)
pip_install = $(pip_once) || { sleep 10; $(pip_once); }
# One thread per process: a test runs up to eight ranks, which would otherwise compete for the cores.
PYTEST := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 $(VENV)/bin/python -m pytest
# Compiled modules are kept also where a container says not to: a test run starts hundreds of processes, each of which
# would compile 3,000 modules again (5 CPU seconds). `pip --no-compile` leaves it to the first import.
export PYTHONDONTWRITEBYTECODE :=
SHELL_SCRIPTS := .ci/run tools/git_hooks/commit-msg $(shell find launch tools -name '*.sh' -o -name '*.sbatch')

DOCS_VENV ?= .venv-docs

.PHONY: env demo lint format slurm test test-all docs clean

env: $(STAMP)

$(STAMP): requirements-cpu.txt setup.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and f"Python 3.11 or later is needed, this is {sys.version}; set PYTHON=")'
	test -x $(VENV)/bin/pip || $(PYTHON) -m venv $(VENV)
	$(call pip_install,$(VENV),pip==$(PIP_VERSION))
	$(call pip_install,$(VENV),-r requirements-cpu.txt)
	$(call pip_install,$(VENV),--no-deps --no-build-isolation --editable .)
	@touch $@

demo: env
	$(VENV)/bin/python tools/demo.py

lint: env
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	$(VENV)/bin/python tools/check_commit_subjects.py
	@if command -v shellcheck >/dev/null; then shellcheck -x $(SHELL_SCRIPTS); \
	else echo "shellcheck is not installed: the shell scripts are not checked" >&2; fi

format: env
	$(VENV)/bin/ruff check --fix .

# Packages that the tests of launch/ need: on Debian and Ubuntu, as root or with sudo. Elsewhere these tests are skipped.
slurm:
	@tools/local_slurm.sh install

# Three processes, one test file at a time in each, every process with its own pool of ranks; with two processes both
# cores often wait. Files in their order: the longest single test is alone in its file and would otherwise come last.
test: slurm lint
	$(PYTEST) -n 3 --dist loadfile --no-loadscope-reorder --durations 15

test-all: slurm lint docs
	$(PYTEST) -m "slow or not slow"

# The documentation site, in site/. Its packages have an environment of their own: they need nothing of the trainer, and
# `make env` stays short.
docs: $(DOCS_VENV)/.installed
	NO_MKDOCS_2_WARNING=1 $(DOCS_VENV)/bin/python -m mkdocs build --strict
	$(DOCS_VENV)/bin/python tools/site_check.py site

$(DOCS_VENV)/.installed: requirements-docs.txt
	test -x $(DOCS_VENV)/bin/pip || $(PYTHON) -m venv $(DOCS_VENV)
	$(call pip_install,$(DOCS_VENV),pip==$(PIP_VERSION))
	$(call pip_install,$(DOCS_VENV),-r requirements-docs.txt)
	@touch $@

clean:
	rm -rf demo runs build dist site *.egg-info .pytest_cache .ruff_cache .mypy_cache
