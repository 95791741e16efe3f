# `make help` lists the targets. Everything happens in the virtual environment .venv.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
C      := $(wildcard csrc/*.[ch] tests/*/*.[ch] tests/*/*/*.[ch])
PYX    := $(wildcard ksmalloc/*.pyx ksmalloc/*.pxi ksmalloc/*.pxd)
BENCH  := -std=gnu11 -D_GNU_SOURCE -O2 -pthread -iquote csrc
CORE   := $(filter-out csrc/preload.c,$(wildcard csrc/*.c))
WATCHED := $(BIN)/pytest tests/test_csrc.py tests/test_sanitizers.py
SECONDS ?= 3600
ROUNDS ?= 500

.DEFAULT_GOAL := help
.PHONY: help build test ctest model asan ubsan tsan valgrind asan-python soak growth crash chaos faults mad fuzz
.PHONY: hostile surroundings old-kernel bench stall breaks lint format docs demo clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "%-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

$(READY): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -e '.[test,docs,dev]'
	touch $@

build: $(READY) ## the virtual environment, and the extension built in place
	$(BIN)/python setup.py --quiet build_ext --inplace

test: build ## all tests
	$(BIN)/pytest

ctest: $(READY) ## the core's own tests, and its floors
	$(BIN)/pytest tests/test_csrc.py tests/test_floors.py

model: $(READY) ## the models of the protocols, checked by spin
	$(BIN)/pytest tests/test_model.py

asan: $(READY) ## the core's own tests under the address and the undefined-behaviour sanitizer
	KSMALLOC_SANITIZER=asan $(WATCHED)

ubsan: $(READY) ## the core's own tests under the undefined-behaviour sanitizer alone
	KSMALLOC_SANITIZER=ubsan $(WATCHED)

tsan: $(READY) ## the core's own tests under the thread sanitizer
	KSMALLOC_SANITIZER=tsan $(WATCHED)

valgrind: $(READY) ## the core's own tests under valgrind; needs valgrind and libc6-dbg
	KSMALLOC_SANITIZER=valgrind $(WATCHED)

asan-python: build ## the Python tests with a module under the address and the undefined-behaviour sanitizer
	$(BIN)/python tests/sanitizers/suite.py

soak: build ## the lost-write soak, SECONDS=3600 for each barrier and copy-on-write
	KSMALLOC_SOAK_SECONDS=$(SECONDS) $(BIN)/pytest -s tests/test_soak.py

growth: build ## memory that is rewritten and merged over and over, SECONDS=3600 long
	KSMALLOC_GROWTH_SECONDS=$(SECONDS) $(BIN)/pytest -s tests/test_growth.py

crash: build ## death, and a stop, at every instruction of every operation on shared memory
	KSMALLOC_CRASH_ALL=1 $(BIN)/pytest -s tests/test_crash.py

chaos: build ## random death, SECONDS=3600 long
	KSMALLOC_CHAOS_SECONDS=$(SECONDS) $(BIN)/pytest -s tests/test_chaos.py -k survivors

faults: build ## every system call fails, at every number, with every error, in every scenario; by chance for SECONDS
	KSMALLOC_FAULTS_SECONDS=full KSMALLOC_FAULTS_PYTHON_SECONDS=$(SECONDS) \
		$(BIN)/pytest -s tests/test_faults.py tests/test_faults_python.py

mad: build ## a peer gone mad, ROUNDS=500 for each build and barrier
	KSMALLOC_MAD_SECONDS=2 KSMALLOC_MAD_ROUNDS=$(ROUNDS) $(BIN)/pytest -s tests/test_mad.py

fuzz: $(READY) ## the fuzz targets under libFuzzer, SECONDS=3600 each; needs clang (CLANG=clang-14)
	$(BIN)/python tests/fuzz/fuzz.py $(SECONDS)

hostile: build ## a program that is hostile to its registered memory, SECONDS=3600 for each barrier
	KSMALLOC_HOSTILE_SECONDS=$(SECONDS) $(BIN)/pytest -s tests/test_hostile_memory.py

surroundings: build ## subinterpreters, ends of programs, signals, stopped peers, debuggers, processes that hide themselves
	$(BIN)/pytest -s tests/test_interpreters.py tests/test_exit.py tests/test_finalised.py tests/test_signals.py \
		tests/test_stopped.py tests/test_debugger.py tests/test_dumpable.py

old-kernel: build ## the tests on Debian's 6.1 kernel, emulated; needs qemu-system-x86 and busybox-static
	$(BIN)/python tests/kernels/old_kernel.py

bench: build ## contests with kernel KSM and others, side by side, five rounds; CONTESTS="merge_one idle": these
	$(BIN)/python tests/bench/run.py $(CONTESTS)

stall: $(READY) ## how long a window keeps a thread from its work; nothing else should run
	mkdir -p build
	$(CC) $(BENCH) tests/bench/stall.c $(CORE) -o build/stall
	build/stall 5000 3

breaks: $(READY) ## what a write to a merged page costs: the kernel, our handler, kernel KSM
	mkdir -p build
	$(CC) $(BENCH) tests/bench/breaks.c $(CORE) -o build/breaks
	build/breaks 4000

lint: build ## formatting, style, types
	$(BIN)/clang-format --dry-run -Werror $(C)
	PATH="$(CURDIR)/$(BIN):$$PATH" cython-lint $(PYX)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/stubtest ksmalloc._core

format: $(READY) ## format everything
	$(BIN)/clang-format -i $(C)
	$(BIN)/ruff check --fix --exit-zero
	$(BIN)/ruff format

docs: build ## the manual, in docs/_build/html; its quick start is executed
	$(BIN)/sphinx-build -W --keep-going -q -b html docs docs/_build/html

demo: build ## what merging does on this machine
	$(BIN)/ksmctl demo

clean: ## remove what was built, but not .venv
	rm -rf build dist docs/_build docs/jupyter_execute *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	rm -f ksmalloc/*.so
	find . -name __pycache__ -type d -not -path './.venv/*' -prune -exec rm -rf {} +
