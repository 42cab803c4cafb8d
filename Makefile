# make test PYTHON=/path/to/python uses an existing environment; otherwise VENV is made and filled.
VENV ?= .venv
BOOTSTRAP ?= python3
# The newest Megatron wants a newer Python, and so an environment of its own.
NEXT := .venv-next
NEXT_PYTHON := 3.12
TORCH ?= torch==2.13.0
JOBS ?= 2
# These wait for Slurm, for timeouts and for one another more than they compute.
CLUSTER_JOBS ?= 3

# Warnings are third parties' own, forty lines of them; plain pytest shows them.
PYTEST = $(PYTHON) -m pytest -q --disable-warnings
SLOWEST := --durations=20

ifdef PYTHON
READY :=
else
PYTHON := $(VENV)/bin/python
READY := $(VENV)/.installed
endif

# ninja (which builds the extension), deepspeed and lowrank-dist are found beside the interpreter.
export PATH := $(dir $(abspath $(shell command -v $(PYTHON) || echo $(PYTHON)))):$(PATH)
export PYTHON
# The ranks of a test share the cores: more than one thread each makes them wait for one another.
export OMP_NUM_THREADS ?= 1

.DEFAULT_GOAL := help
.PHONY: help install check types quick test test-all test-cluster test-nightly test-next docs docs-reference quickstart cuda-build-check gpu-check gpu-bench clean

help:
	@echo "make install           .venv with everything; the targets below do it themselves"
	@echo "make check             ruff, mypy and the quick unit tests"
	@echo "make test              ruff and all tests but those below"
	@echo "make test-all          layouts resharded, runs killed in their saves, mutated files, tokens, llama.cpp"
	@echo "make test-cluster      as root: a real Slurm and real network hosts"
	@echo "make test-nightly      what takes long and rarely finds anything"
	@echo "make test-next         the tests of make test on Python $(NEXT_PYTHON) and the newest Megatron"
	@echo "make docs              the site of docs/ in build/site"
	@echo "make docs-reference    docs/reference: configuration, commands, other trainers"
	@echo "make quickstart        train, evaluate, merge and prove a small model"
	@echo "make cuda-build-check  compile the CUDA operators; needs nvcc, no GPU"
	@echo "make gpu-check         on a GPU: what can be proven only there (tests/gpu/README.md)"
	@echo "make gpu-bench         on a GPU: where the time goes"
	@echo "make clean             remove what was built"
	@echo "CONTRIBUTING.md says which of them a change needs and how long they take"

install: $(READY)

# Installs everything into the environment of PYTHON. The operators' libraries lie beside their sources and serve every
# Python and every build of one torch release, so the environment that was installed last has built them for all.
define fill
	$(PYTHON) -m pip install -q -c .ci/constraints.txt setuptools ninja
	$(PYTHON) -m pip install -q -c .ci/constraints.txt $(TORCH)
	$(PYTHON) -m pip install -q -c .ci/constraints.txt --no-build-isolation -e '.[test,docs,quickstart]'
	touch $@
endef

INSTALLED_FROM := setup.py pyproject.toml .ci/constraints.txt $(wildcard csrc/*.cpp csrc/*/*)

$(VENV)/.installed: $(INSTALLED_FROM)
	$(BOOTSTRAP) -m venv $(VENV)
	$(fill)

$(NEXT)/.installed test-next: override export PYTHON := $(NEXT)/bin/python
$(NEXT)/.installed test-next: export PATH := $(abspath $(NEXT)/bin):$(PATH)

$(NEXT)/.installed: $(INSTALLED_FROM)
	python=$$(.ci/find-python $(NEXT_PYTHON)) && "$$python" -m venv $(NEXT)
	$(fill)

# ruff, mypy and the quick unit tests: two and a half minutes on 2 cores. mypy has one thread; its first run takes almost
# a minute.
check: $(READY)
	$(PYTHON) -m ruff check .
	$(MAKE) --no-print-directory -j2 --output-sync types quick

types: $(READY)
	$(PYTHON) -m mypy

quick: $(READY)
	$(PYTEST) -n $(JOBS) --dist loadfile -m "not slow and not nightly" tests/unit

test: $(READY)
	$(PYTHON) -m ruff check .
	$(PYTHON) -m mypy
	$(PYTEST) -n $(JOBS) --dist worksteal $(SLOWEST) tests/unit tests/dist tests/integration

# Tests that take too long for every change: every layout resumed in every other, runs killed in their saves, all
# mutated files, a download of 77 MB.
test-all: $(READY)
	$(PYTEST) -n $(JOBS) --dist loadfile $(SLOWEST) tests/long

# A real Slurm and real network hosts on this machine. Run as root; missing programs are installed from Debian.
test-cluster: $(READY)
	bash tests/cluster/install.sh
	$(PYTEST) -n $(CLUSTER_JOBS) --dist loadfile --no-loadscope-reorder $(SLOWEST) tests/cluster

# Run before an issue is closed: tests that take long and rarely find what those above do not.
test-nightly: $(READY)
	$(PYTEST) -m nightly -n $(JOBS) --dist loadfile $(SLOWEST) tests/unit tests/dist tests/integration tests/long
	$(MAKE) --no-print-directory test-next

test-next: $(NEXT)/.installed
	$(PYTEST) -n $(JOBS) --dist worksteal $(SLOWEST) tests/unit tests/dist tests/integration

# Any warning is an error: a link, an anchor or an image that leads nowhere, a page that is missing from the nav.
docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(PYTHON) -m mkdocs build --quiet --strict

docs-reference: $(READY)
	$(PYTHON) -m docs.generate_reference

# The start of the whole target, so that the table counts the installation too.
quickstart: export MAKE_STARTED_MS := $(shell date +%s%3N)
quickstart: $(READY)
	bash launch/quickstart/run.sh

# Builds the CUDA operators against a CUDA build of torch, which it downloads once; needs nvcc, no GPU.
cuda-build-check: $(READY)
	JOBS=$(JOBS) bash tests/cuda_build/check.sh

# At most 330 s each on one GPU. Given PYTHON, they install nothing and need no network (tests/gpu/README.md).
gpu-check: $(READY)
	bash tests/gpu/check.sh

gpu-bench: $(READY)
	bash tests/gpu/bench.sh

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis $(VENV)/.installed $(NEXT)/.installed lowrank_dist/ops/_C*.so
	find lowrank_dist tests launch benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
