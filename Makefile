# Doors to the suite. `make help` lists them.

# The same for every target that submits; empty means the default of scripts/submit.py.
WORKLOAD ?= all
SIZE ?= mini
HARNESS ?=
SEEDS ?= 1
GPUS ?=
DATA_DIR ?=
F ?=
TAU ?=
OUT ?=
DRY_RUN ?=
STEPS ?=
PROCESSES ?=
WANDB ?=
AUTHORS ?=
AFFILIATIONS ?=
RUNS ?=

PYTHON ?= python3
VENV ?= .venv
# AlgoPerf's own harness lives beside ours, because its packages are pinned otherwise.
ALGOPERF_VENV ?= .venv-algoperf
TORCH ?= 2.13.0

ENGINE ?= docker
IMAGE ?= algoperf-shampoo
BASE ?= debian:bookworm-slim
CUDA ?=

ifeq ($(VENV),none)
PY := $(PYTHON)
RUN_READY :=
DEV_READY :=
else
PY := $(VENV)/bin/python
RUN_READY := $(VENV)/.ready-run
DEV_READY := $(VENV)/.ready-dev
endif

flag = $(if $($(1)),--$(2)='$($(1))')

.PHONY: algoperf-env data-algoperf-mini docker-build help test test-slow test-gpu test-kernels lint types table1 FORCE
.DEFAULT_GOAL := help

help: ## list targets and variables
	@echo 'make submit-<variant>  train and print the table; <variant> is one of:'
	@for f in submissions/*/submission.py; do d=$${f%/submission.py}; echo "  $${d##*/}" | tr _ -; done
	@echo 'make export-<variant>  write it as a folder of its own, for submissions_algorithms'
	@echo 'make docker-submit-<variant>  the same in a container; DATA_DIR= and OUT= are mounted'
	@grep -hE '^[a-z0-9-]+:.*## ' Makefile | sed -E 's/^([a-z0-9-]+):.*## /make \1\t/' | expand -t 26
	@echo
	@echo 'variables of submit-<variant>, NAME=value, and their defaults:'
	@echo '  WORKLOAD=all       fastmri, imagenet_vit, ogbg or all'
	@echo '  SIZE=mini          mini (small models, real data shipped here) or full'
	@echo '  HARNESS=           embedded (default for mini) or algoperf (default for full)'
	@echo '  SEEDS=1            a count (3: seeds 1, 2, 3) or a list (3,4,5)'
	@echo '  GPUS=              number of GPUs; default: what there is'
	@echo '  DATA_DIR=          data folder; minis need none'
	@echo '  F=  TAU=           steps between checks of the basis; threshold of Eq. 11'
	@echo '  OUT=               folder for the runs; default results/runs/SIZE'
	@echo '  STEPS=  WANDB=     with HARNESS=algoperf: end after so many steps; 1: log to wandb too'
	@echo '  PROCESSES=         with HARNESS=algoperf and no GPU: processes'
	@echo '  DRY_RUN=           1: check, print what would run, write nothing'
	@echo '  VENV=.venv         none: use PYTHON as it is (containers, GPU nodes)'
	@echo 'variable of table1: RUNS=results/runs, folders of runs, comma-separated'

submit-%: $(RUN_READY) FORCE
	@$(PY) scripts/submit.py --variant='$*' --workload='$(WORKLOAD)' --size='$(SIZE)' \
	  --seeds='$(SEEDS)' $(call flag,HARNESS,harness) $(call flag,GPUS,gpus) \
	  $(call flag,DATA_DIR,data_dir) $(call flag,F,f) $(call flag,TAU,tau) \
	  $(call flag,OUT,out) $(call flag,STEPS,steps) $(call flag,PROCESSES,processes) \
	  $(if $(WANDB),--wandb) $(if $(DRY_RUN),--dry_run)

table1: $(RUN_READY) ## Table 1 from the runs so far, beside the paper's; written to results/table1.*
	@$(PY) scripts/table.py $(call flag,RUNS,runs)

algoperf-env: ## AlgoPerf's harness, pinned, in .venv-algoperf with torch TORCH=2.13.0
	@test -x $(ALGOPERF_VENV)/bin/python || $(PYTHON) -m venv $(ALGOPERF_VENV)
	$(ALGOPERF_VENV)/bin/pip install 'torch==$(TORCH)' -r requirements-algoperf.txt
	$(ALGOPERF_VENV)/bin/pip install --no-deps -r requirements-algoperf-no-deps.txt

# The Python with AlgoPerf in it: ALGOPERF_PYTHON of the environment, or the one made above.
ALGOPERF_PYTHON ?= $(ALGOPERF_VENV)/bin/python

data-algoperf-mini: ## real mini data in AlgoPerf's formats, into OUT=data/algoperf_mini
	@test -x '$(ALGOPERF_PYTHON)' \
	  || { echo 'error: $(ALGOPERF_PYTHON): no such program; run make algoperf-env' >&2; exit 2; }
	@$(ALGOPERF_PYTHON) scripts/make_algoperf_mini_data.py $(call flag,OUT,out)

export-%: $(RUN_READY) FORCE
	@$(PY) scripts/export.py --variant='$*' $(call flag,OUT,out) $(call flag,AUTHORS,authors) \
	  $(call flag,AFFILIATIONS,affiliations)

docker-build: ## image IMAGE= with torch TORCH=, CUDA= (cu128), on BASE=; ENGINE=podman works too
	$(if $(DRY_RUN),@echo) $(ENGINE) build --build-arg BASE=$(BASE) --build-arg TORCH=$(TORCH) \
	  --build-arg CUDA=$(CUDA) --tag $(IMAGE):$(TORCH) .

# In the container the words are those of submit-<variant>; the folders are mounted.
docker-submit-%: FORCE
	@test -d '$(DATA_DIR)' || { echo "error: DATA_DIR=$(DATA_DIR): no such folder" >&2; exit 2; }
	@test -n '$(OUT)' || { echo 'error: OUT= is needed: a folder for the runs' >&2; exit 2; }
	@$(if $(DRY_RUN),:,mkdir -p '$(OUT)')
	$(if $(DRY_RUN),@echo) $(ENGINE) run --rm --gpus '$(or $(GPUS),all)' --ipc host \
	  --user "$$(id -u):$$(id -g)" $(if $(WANDB),--env WANDB_API_KEY) \
	  --volume '$(abspath $(DATA_DIR)):/data:ro' --volume '$(abspath $(OUT)):/results' \
	  $(IMAGE):$(TORCH) submit-$* HARNESS=algoperf DATA_DIR=/data WORKLOAD='$(WORKLOAD)' SIZE='$(SIZE)' \
	  SEEDS='$(SEEDS)' $(foreach v,GPUS F TAU STEPS PROCESSES WANDB,$(if $($(v)),$(v)='$($(v))'))

# One process a core, one thread each: the models are too small to share among threads.
test: $(DEV_READY) ## the tests; under 5 minutes on 2 cores
	@OMP_NUM_THREADS=1 $(PY) -m pytest -n auto

test-slow: $(DEV_READY) ## the tests that take minutes
	@$(PY) -m pytest -m slow

test-gpu: $(DEV_READY) ## the tests that need a CUDA device
	@$(PY) -m pytest -m gpu

test-kernels: $(VENV)/.ready-dev-kernels ## the GPU kernels without a GPU: compiled, and interpreted (Linux)
	@$(PY) -m pytest -n auto tests/optim/test_kernels_compile.py
	@TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(PY) -m pytest -n auto -m gpu tests/optim/test_grouped.py

lint: $(DEV_READY) ## ruff: rules and formatting of imports
	@$(PY) -m ruff check .

types: $(DEV_READY) ## mypy
	@$(PY) -m mypy

# A stamp is newer than the files that say what to install, or the install runs again.
$(VENV)/.ready-%: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "error: $(PYTHON) is too old: Python 3.11 or newer, as in PYTHON=python3.12" >&2; exit 2; }
	@test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) (once; extra: $*)"
	@$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$*]'
	@touch $@

FORCE:
