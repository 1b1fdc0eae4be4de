# make help lists the targets. Everything is installed into $(VENV) from the two requirements files.
PYTHON ?= python3
VENV ?= .venv
# The index to take torch from; empty: pip's own. auto: on Linux, whose usual torch brings gigabytes of CUDA, the CPU
# build where no NVIDIA driver is found and its index answers within 5 seconds; elsewhere pip's own.
TORCH_INDEX ?= auto

BIN = $(VENV)/bin
PY = $(BIN)/python
SOURCES = *.py benchmarks config data docs kernels tests .ci

.DEFAULT_GOAL := help
.PHONY: help install demo test test-all format check-format bench bench-step bench-ops compare card card-table \
  kernel-report gpu gpu-table gpu-wheels clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 16

CPU_INDEX = https://download.pytorch.org/whl/cpu
TORCH = $$(grep '^torch==' requirements.txt)
SYSTEM = $(shell uname -s)
DRIVER = command -v nvidia-smi || test -e /proc/driver/nvidia/version
ANSWERS = $(PY) -c 'import signal, urllib.request as u; signal.alarm(5); u.urlopen("$(CPU_INDEX)/torch/")'

$(VENV)/run.stamp: requirements.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed: make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	@index="$(TORCH_INDEX)" why="as asked"; \
	if [ "$$index" = auto ]; then index=; \
	  if [ "$(SYSTEM)" != Linux ]; then why="on $(SYSTEM)"; \
	  elif ($(DRIVER)) >/dev/null 2>&1; then why="an NVIDIA driver is here"; \
	  elif ($(ANSWERS)) >/dev/null 2>&1; then index=$(CPU_INDEX); why="its CPU build: no NVIDIA driver is here"; \
	  else why="no NVIDIA driver is here, but the index of CPU builds does not answer"; fi; fi; \
	echo "torch: from $${index:-the index of pip} ($$why)"; \
	if [ -n "$$index" ]; then $(PY) -m pip install -q $(TORCH) --index-url $$index || \
	  { [ "$(TORCH_INDEX)" = auto ] && echo "torch: that failed; from the index of pip"; }; fi
	$(PY) -m pip install -q -r requirements.txt
	@touch $@

$(VENV)/dev.stamp: $(VENV)/run.stamp requirements-dev.txt requirements-peers.txt
	$(PY) -m pip install -q -r requirements-dev.txt -c requirements.txt
	@touch $@

install: $(VENV)/run.stamp  ## make the virtual environment

data/stdlib/meta.json: | $(VENV)/run.stamp
	$(PY) data/stdlib/prepare.py

# The second call of the comparison trains nothing: it prints the table again, below the sample.
DEMO = $(PY) compare.py config/demo.py --attention_type=softmax,gla --equal_params --out_dir=out/demo
demo: $(VENV)/run.stamp data/stdlib/meta.json  ## train two types alike, sample, compare: under 4 minutes of training on 2 cores
	@echo "two runs at once, of as many tokens each; their lines go to out/demo/*/output.txt"
	$(DEMO)
	$(PY) sample.py --out_dir=$$(ls -dt out/demo/gla-*/ | head -1) --start="def " --max_new_tokens=300
	$(DEMO)

test: $(VENV)/dev.stamp  ## the test suite
	$(PY) -m pytest -n 2

test-all: $(VENV)/dev.stamp  ## the test suite with the slow tests
	$(PY) -m pytest -n 2 -m "not gpu"

format: $(VENV)/dev.stamp  ## format and sort imports
	$(BIN)/ruff check --fix $(wildcard $(SOURCES))
	$(BIN)/ruff format $(wildcard $(SOURCES))

check-format: $(VENV)/dev.stamp  ## fail if format would change a file
	$(BIN)/ruff check $(wildcard $(SOURCES))
	$(BIN)/ruff format --check $(wildcard $(SOURCES))

bench: $(VENV)/run.stamp  ## what a layer of each attention type costs: table, out/bench.json, out/bench.png
	$(PY) bench.py

bench-step: $(VENV)/run.stamp  ## training speed against the matmul peak and a plain PyTorch stack
	$(PY) bench.py --what=step

bench-ops: $(VENV)/dev.stamp  ## attention operators beside softmax attention and naive loops, against time
	$(PY) bench.py --what=ops --peers=true

# make compare CONFIG=config/train_enwik8_small.py TYPES="softmax gla gla,softmax" SEEDS="1 2"; runs that are done are
# kept until CONFIG, OPTIONS, the data or the code change
CONFIG = config/train_enwik8_tiny.py
OPTIONS = --max_iters=500
TYPES = all
SEEDS = 1 2 3
comma = ,
space = $(subst ,, )
list = $(subst $(space),$(comma),$(strip $(1)))

compare: $(VENV)/run.stamp  ## train TYPES alike over SEEDS, then their validation loss, mean and standard deviation
	$(PY) compare.py $(CONFIG) --attention_type=$(call list,$(subst $(comma),+,$(TYPES))) --seed=$(call list,$(SEEDS)) \
	  $(OPTIONS)

# make card PART=recall CELLS=gla,gdn BUDGET=3600; a part goes on where it ended, also in another clone
CELLS =
BUDGET = 0
card: $(VENV)/run.stamp  ## one PART of the card: language, long, recall, state or length; CELLS=types, BUDGET=seconds
	$(PY) -m benchmarks.card --part=$(if $(filter command%,$(origin PART)),$(PART),language) --types=$(CELLS) --budget=$(BUDGET)

card-table: $(VENV)/run.stamp  ## the card's table, and docs/card.png, from docs/card
	$(PY) -m benchmarks.card

kernel-report: $(VENV)/run.stamp  ## registers, spills, shared memory and tensor-core instructions of each Triton kernel
	$(PY) -m kernels.report

WHEELS = .wheels

# Nothing is installed for it: on a borrowed machine write make gpu PART=1 PYTHON=python3, and carry wheels along.
PART = 1
DEVICE = cuda
LIMIT = 480
TOKENS = 100
gpu:  ## on a CUDA machine, PART=1..4: checks, operators, steps, quality; each writes docs/gpu-PART.json within 9 minutes
	mkdir -p out
	PYTHONPATH=$(WHEELS) $(PYTHON) bench.py --what=gpu --part=$(PART) --device=$(DEVICE) --limit=$(LIMIT) --rounds=3 \
	  --seconds=0.3 --tokens=$(TOKENS) --json=$(if $(filter cpu,$(DEVICE)),out,docs)/gpu-$(PART).json

gpu-table:  ## the section of docs/results.md from docs/gpu-1.json to docs/gpu-4.json
	$(PYTHON) -m benchmarks.gpu

gpu-wheels:  ## flash-linear-attention and einops into $(WHEELS), for a machine without a network
	$(PYTHON) -m pip install -q --no-deps --target $(WHEELS) $$(grep '^fla-core' requirements-peers.txt) einops==0.8.2

clean:  ## remove the environment, caches and runs; prepared data stays
	rm -rf $(VENV) out .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
