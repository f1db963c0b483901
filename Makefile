# Doors to the suite. `make help` lists them.

# Words of the command line, by target. A word that its targets do not take is refused.
words.all := VENV PYTHON
words.submit := WORKLOAD SIZE HARNESS SEEDS GPUS DATA_DIR F TAU SET SEARCH_SPACE TRIALS STEPS OUT \
  PROCESSES WANDB KEEP_DIVERGED ALL_STEPS EVALS RULESET VERSION AGAINST PRICE DRY_RUN ALGOPERF_PYTHON
words.study := STUDY WORKLOAD SIZE HARNESS SEEDS GPUS DATA_DIR STEPS OUT PROCESSES WANDB DRY_RUN \
  ALGOPERF_PYTHON RULESET VERSION PRICE LAUNCHER JOBS PARTITION ACCOUNT QOS TIME MEM CPUS LIMIT SBATCH CONTAINER IMAGE
words.claims := QUICK CLAIMS OUT JOBS WALL DRY_RUN
words.claims-runs := CLAIMS OUT RUNS
words.status := STUDY WORKLOAD SIZE HARNESS SEEDS STEPS OUT RULESET VERSION AGAINST EVERY ONCE
words.export := OUT AUTHORS AFFILIATIONS F TAU SET SEARCH_SPACE RULESET
words.submission-pr := EXPORT RUNS OUT AUTHORS AFFILIATIONS
words.table1 := RUNS TABLE VERSION
words.table3 := RUNS TABLE VERSION
words.rank := RUN VARIANT
words.figures := RUNS OUT VERSION
words.report := RUNS OUT TITLE VERSION
words.figure4 := RUN OUT
words.health := RUN OUT
words.repeat := RUN OUT DATA_DIR
words.same-curves := BEFORE AFTER VARIANT WORKLOAD STEPS
words.test-algoperf := PARTS DATA_DIR OUT ALGOPERF_PYTHON
words.algoperf-env := TORCH ALGOPERF_VENV ALGOPERF_COMMIT
words.data-algoperf-mini := OUT ALGOPERF_PYTHON ALGOPERF_VENV
words.docker-build := ENGINE IMAGE BASE TORCH CUDA ALGOPERF_COMMIT DRY_RUN
words.docker-submit := $(filter-out HARNESS KEEP_DIVERGED ALL_STEPS EVALS AGAINST PRICE ALGOPERF_PYTHON,$(words.submit)) \
  ENGINE IMAGE TORCH
# Families of targets, by the beginning of their names.
families := submit export docker-submit

WORKLOAD ?= all
SIZE ?= mini
SEEDS ?= 1

PYTHON ?= python3
VENV ?= .venv
# AlgoPerf's own harness lives beside ours, because its packages are pinned otherwise.
ALGOPERF_VENV ?= .venv-algoperf
TORCH ?= 2.13.0

ENGINE ?= docker
IMAGE ?= algoperf-shampoo
BASE ?= debian:bookworm-slim

# What was given on the command line, before it is touched.
given := $(foreach v,$(.VARIABLES),$(if $(filter command,$(word 1,$(origin $(v)))),$(v)))
# A common name in environments, and another program's there.
ifeq ($(filter VERSION,$(given)),)
  VERSION :=
endif
families.of = $(foreach f,$(families),$(if $(filter $(f)-%,$(1)),$(f)))
taken := $(sort $(words.all) $(foreach g,$(or $(MAKECMDGOALS),help), \
  $(words.$(g)) $(foreach f,$(call families.of,$(g)),$(words.$(f)))))
# Words that make itself or a program behind it takes pass.
passing := MAKE% GNUMAKEFLAGS SHELL .SHELLFLAGS PATH HOME USER TMPDIR LANG LC_% LD_% CC CXX %FLAGS \
  OMP_% MKL_% CUDA_% NVIDIA_% NCCL_% TORCH_% TORCHINDUCTOR_% PYTORCH_% TRITON_% WANDB_% PIP_% \
  PYTHON% TF_% SHAMPOO_% SLURM_% %_proxy %_PROXY
refused := $(filter-out $(taken) $(passing),$(given))

# A word's value is data, `$$` too, and reaches the scripts through the environment: a recipe's
# $$(call flag,OUT,out) becomes the one argument --out=VALUE, or none where OUT is empty.
all.words := $(sort $(foreach v,$(filter words.%,$(.VARIABLES)),$($(v))))
$(foreach w,$(all.words) $(refused),$(eval override $(w) := $$(value $(w))))
export $(all.words) $(refused)
given.flag = $(if $(filter $(1),$(given)),$(flag))
flag = $${$(1):+"--$(2)=$$$(1)"}
quoted = '$(subst ','\'',$(1))'

# Python in VENV, which is made first where it is missing, with an extra of pyproject.toml. `exec`,
# because a child that a shell has just forked can miss a Ctrl-C.
IN_RUN := @exec sh scripts/in_venv.sh run
IN_DEV := @exec sh scripts/in_venv.sh dev

.PHONY: words algoperf-env data-algoperf-mini docker-build help test test-slow test-faults test-slurm test-algoperf \
  test-gpu test-kernels lint types table1 table3 tables rank figures report figure4 health repeat study claims claims-runs status same-curves \
  submission-pr FORCE
.DEFAULT_GOAL := help

help: words ## list targets and variables
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
	@echo '  SEEDS=1            a count (3: seeds 1, 2, 3) or a list (3,4,5; one seed is 7,)'
	@echo '  SET=               fields of the point: SET="learning_rate=0.02 weight_decay=0"'
	@echo '  F=  TAU=           steps between checks of the basis; threshold of Eq. 11'
	@echo '  SEARCH_SPACE=      another file of points;  TRIALS=1  how many of its points to run'
	@echo '  STEPS=             end after so many steps'
	@echo '  OUT=               folder for the runs; default results/runs/SIZE'
	@echo '  GPUS=              number of GPUs; default: what there is'
	@echo '  DATA_DIR=          data folder; minis need none'
	@echo '  WANDB=             1: one record a run for wandb too, offline without a key'
	@echo '  PROCESSES=         with HARNESS=algoperf and no GPU: processes'
	@echo '  KEEP_DIVERGED=     1: with the embedded harness, a run whose loss is not finite goes on'
	@echo '  AGAINST=           a run, or a folder of runs: at each evaluation, where this one stands'
	@echo '  ALL_STEPS=         1: with the embedded harness, every step of the budget, past the targets'
	@echo '  EVALS=             with ALL_STEPS=1: steps between two evaluations, instead of the mini'"'"'s 25'
	@echo '  PRICE=             of an hour of one GPU: shown with the time of full-size runs'
	@echo '  RULESET=external   AlgoPerf'"'"'s; self: the point built into the submission'
	@echo '  VERSION=           AlgoPerf'"'"'s, v0.5, v0.6 or 2026: its budgets, targets, step hints; with HARNESS=algoperf'
	@echo '  DRY_RUN=           1: check, print what would run, write nothing'
	@echo '  VENV=.venv         none: use PYTHON as it is (containers, GPU nodes)'
	@echo 'variables of table1, table3, figures, report: RUNS=results/runs, folders of runs, comma-separated;'
	@echo '  TABLE=results/table1  where a table is written (.md, .tex, .csv, .json, .index.md); with RUNS= nowhere else'
	@echo '  VERSION=  runs of one version of AlgoPerf alone'

# Refuses words, with the nearest that is taken, before anything else is done.
words:
ifneq ($(refused),)
	@"$$PYTHON" scripts/words.py --goals=$(call quoted,$(MAKECMDGOALS)) --taken=$(call quoted,$(taken)) \
	  --known=$(call quoted,$(all.words)) $(foreach w,$(refused),$(call quoted,$(w)))
endif

submit-%: words FORCE
	$(IN_RUN) scripts/submit.py --variant=$(call quoted,$*) $(call flag,WORKLOAD,workload) \
	  $(call flag,SIZE,size) $(call flag,HARNESS,harness) $(call flag,SEEDS,seeds) \
	  $(call flag,GPUS,gpus) $(call flag,DATA_DIR,data_dir) $(call flag,F,f) $(call flag,TAU,tau) \
	  $(call flag,SET,set) $(call flag,SEARCH_SPACE,search_space) $(call flag,TRIALS,trials) \
	  $(call flag,STEPS,steps) $(call flag,PROCESSES,processes) $(call flag,OUT,out) \
	  $(call flag,WANDB,wandb) $(call flag,KEEP_DIVERGED,keep_diverged) \
	  $(call flag,ALL_STEPS,all_steps) $(call flag,EVALS,evals) $(call flag,PRICE,price) \
	  $(call flag,RULESET,ruleset) $(call flag,VERSION,version) $(call flag,AGAINST,against) \
	  $(call flag,DRY_RUN,dry_run)

table1: words ## Table 1 from the runs so far, beside the paper's; written to results/table1.*
	$(IN_RUN) scripts/table.py $(call flag,RUNS,runs) $(call flag,TABLE,out) $(call flag,VERSION,version)

table3: words ## Table 3, likewise; written to results/table3.*
	$(IN_RUN) scripts/table.py --table=table3 $(call flag,RUNS,runs) $(call flag,TABLE,out) \
	  $(call flag,VERSION,version)

rank: words ## score and place in AlgoPerf's 2026 pool, of runs RUN= or of the paper's steps, VARIANT=
	$(IN_RUN) scripts/rank.py $(call flag,RUN,run) $(call flag,VARIANT,variant)

tables: words ## the committed tables and pages of claims again from the committed runs
	$(IN_RUN) scripts/table.py --write

figures: words ## curves and times of the runs as PNG and SVG, into OUT=results/figures
	@exec sh scripts/in_venv.sh figures scripts/figures.py $(call flag,RUNS,runs) $(call flag,OUT,out) \
	  $(call flag,VERSION,version)

report: words ## one page with tables, figures and links to every log, OUT=results/report.html
	@exec sh scripts/in_venv.sh figures scripts/figures.py --report $(call flag,RUNS,runs) \
	  $(call flag,OUT,out) $(call flag,TITLE,title) $(call flag,VERSION,version)

figure4: words ## eigendecompositions over training by kind and by factor, of a run RUN=, into OUT=
	@exec sh scripts/in_venv.sh figures scripts/health.py --figure4 $(call flag,RUN,run) $(call flag,OUT,out)

health: words ## what the preconditioner did in a run RUN=, beside its curve, into OUT=results/figures
	@exec sh scripts/in_venv.sh figures scripts/health.py $(call flag,RUN,run) $(call flag,OUT,out)

repeat: words ## train a run again from its folder, RUN=, and compare; into OUT=results/repeats/N
	$(IN_RUN) scripts/repeat.py $(call flag,RUN,run) $(call flag,OUT,out) $(call flag,DATA_DIR,data_dir)

same-curves: words ## whether BEFORE= (the records' commit) and AFTER= (the files here) train the same minis
	$(IN_RUN) scripts/same_curves.py $(call flag,BEFORE,before) $(call flag,AFTER,after) \
	  $(call flag,VARIANT,variant) $(call flag,WORKLOAD,workload) $(call flag,STEPS,steps)

algoperf-env: words ## AlgoPerf's harness, pinned or at ALGOPERF_COMMIT=, in .venv-algoperf; torch TORCH=2.13.0
	@exec sh scripts/held.sh "$$PYTHON" -I scripts/install.py --python="$$PYTHON" --venv="$$ALGOPERF_VENV" --torch="$$TORCH" \
	  $(call flag,ALGOPERF_COMMIT,algoperf_commit) algoperf

data-algoperf-mini: words ## real mini data in AlgoPerf's formats, into OUT=data/algoperf_mini
	@exec sh scripts/in_venv.sh algoperf scripts/data/algoperf_mini.py $(call flag,OUT,out)

# A study has seeds of its own, and no image unless one is given.
study: words ## plan, launch and resume the runs behind a table: STUDY=table3 SIZE=full LAUNCHER=slurm
	$(IN_RUN) scripts/study.py $(call flag,STUDY,study) $(call flag,WORKLOAD,workload) \
	  $(call flag,SIZE,size) $(call flag,HARNESS,harness) $(call given.flag,SEEDS,seeds) \
	  $(call flag,GPUS,gpus) $(call flag,DATA_DIR,data_dir) $(call flag,STEPS,steps) \
	  $(call flag,OUT,out) $(call flag,PROCESSES,processes) $(call flag,WANDB,wandb) \
	  $(call flag,LAUNCHER,launcher) $(call flag,JOBS,jobs) $(call flag,PARTITION,partition) \
	  $(call flag,ACCOUNT,account) $(call flag,QOS,qos) $(call flag,TIME,time) $(call flag,MEM,mem) \
	  $(call flag,CPUS,cpus) $(call flag,LIMIT,limit) $(call flag,SBATCH,sbatch) \
	  $(call flag,CONTAINER,container) $(call given.flag,IMAGE,image) $(call flag,PRICE,price) \
	  $(call flag,RULESET,ruleset) $(call flag,VERSION,version) $(call flag,DRY_RUN,dry_run)

claims: words ## what the paper claims, on the minis, decided by a declared rule; QUICK=1: does it run?
	$(IN_RUN) scripts/claims.py $(call flag,CLAIMS,claims) $(call flag,QUICK,quick) \
	  $(call flag,OUT,out) $(call flag,JOBS,jobs) $(call flag,WALL,wall) $(call flag,DRY_RUN,dry_run)

claims-runs: words ## the runs behind the committed pages of claims, unpacked into OUT=results/runs/committed
	$(IN_RUN) scripts/claims_runs.py $(call flag,CLAIMS,claims) $(call flag,OUT,out) $(call flag,RUNS,runs)

status: words ## how the runs of a study go, live on a terminal: STUDY=table3, or all in OUT=
	$(IN_RUN) scripts/status.py $(call flag,STUDY,study) $(call flag,WORKLOAD,workload) \
	  $(call flag,SIZE,size) $(call flag,HARNESS,harness) $(call given.flag,SEEDS,seeds) \
	  $(call flag,STEPS,steps) $(call flag,OUT,out) $(call flag,RULESET,ruleset) \
	  $(call flag,VERSION,version) $(call flag,AGAINST,against) $(call flag,EVERY,every) $(call flag,ONCE,once)

export-%: words FORCE
	$(IN_RUN) scripts/export.py --variant=$(call quoted,$*) $(call flag,OUT,out) \
	  $(call flag,AUTHORS,authors) $(call flag,AFFILIATIONS,affiliations) $(call flag,F,f) \
	  $(call flag,TAU,tau) $(call flag,SET,set) $(call flag,SEARCH_SPACE,search_space) \
	  $(call flag,RULESET,ruleset)

submission-pr: words ## text of a pull request for EXPORT=exports/...; evidence from RUNS=; AUTHORS=
	$(IN_RUN) scripts/submission_pr.py $(call flag,EXPORT,export) $(call flag,RUNS,runs) \
	  $(call flag,OUT,out) $(call flag,AUTHORS,authors) $(call flag,AFFILIATIONS,affiliations)

docker-build: words ## image IMAGE= with torch TORCH=, CUDA= (cu128), on BASE=; ENGINE=podman works too
	@"$$PYTHON" scripts/container.py build

# In the container the words are those of submit-<variant>; the folders are mounted.
docker-submit-%: words FORCE
	@"$$PYTHON" scripts/container.py submit $(call quoted,$*)

# One process a core, one thread each: the models are too small to share among threads.
test: words ## the tests; under 5 minutes on 2 cores
	@OMP_NUM_THREADS=1 exec sh scripts/in_venv.sh dev -m pytest -n auto

test-slow: words ## the tests that take minutes
	$(IN_DEV) -m pytest -m slow

test-faults: words ## kills, power cuts, full disks, damaged files by the thousand; under 15 minutes
	@OMP_NUM_THREADS=1 exec sh scripts/in_venv.sh dev -m pytest -n auto -m faults

test-gpu: words ## the tests that need a CUDA device
	$(IN_DEV) -m pytest -m gpu

test-slurm: words ## a study on a real Slurm of two nodes on this machine (root; slurmctld slurmd munge)
	@exec sh scripts/in_venv.sh dev -m pytest -m slurm tests/slurm

# PARTS= of tests/algoperf/all_acceptance.py, OUT= for the records.
test-algoperf: words ## AlgoPerf's own runner on a CPU: kills, power cuts, every variant and export; three hours
	@OMP_NUM_THREADS=1 exec sh scripts/in_venv.sh dev -m tests.algoperf.all_acceptance \
	  $(call flag,PARTS,parts) $(call flag,DATA_DIR,data_dir) $(call flag,OUT,out)

test-kernels: words ## the GPU kernels without a GPU: compiled, and interpreted (Linux)
	@exec sh scripts/in_venv.sh dev-kernels -m pytest -n auto tests/optim/test_kernels_compile.py
	@TRITON_INTERPRET=1 OMP_NUM_THREADS=1 exec sh scripts/in_venv.sh dev-kernels \
	  -m pytest -n auto -m gpu tests/optim/test_triton_ops.py tests/optim/test_gpu_trouble.py tests/optim/test_operations.py

lint: words ## ruff: rules and formatting
	$(IN_DEV) -m ruff check .
	$(IN_DEV) -m ruff format --check --quiet .

types: words ## mypy
	$(IN_DEV) -m mypy

FORCE:
