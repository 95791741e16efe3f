# `make help` lists the targets. Everything happens in the virtual environment .venv.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
C      := $(wildcard csrc/*.[ch] tests/csrc/*.[ch] tests/soak/*.[ch] tests/eintr/*.c tests/bench/*.c)
PYX    := $(wildcard ksmalloc/*.pyx ksmalloc/*.pxi ksmalloc/*.pxd)
BENCH  := -std=gnu11 -D_GNU_SOURCE -O2 -pthread -iquote csrc
CORE   := $(filter-out csrc/preload.c,$(wildcard csrc/*.c))
SECONDS ?= 3600

.DEFAULT_GOAL := help
.PHONY: help build test ctest model asan ubsan soak growth stall breaks lint format docs demo clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "%-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

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

asan: $(READY) ## the core's own tests under the address sanitizer
	KSMALLOC_TEST_CFLAGS='-fsanitize=address -fno-omit-frame-pointer -Wno-error' $(BIN)/pytest tests/test_csrc.py

ubsan: $(READY) ## the core's own tests under the undefined-behaviour sanitizer
	KSMALLOC_TEST_CFLAGS='-fsanitize=undefined -fno-sanitize-recover=all -Wno-error' $(BIN)/pytest tests/test_csrc.py

soak: build ## the lost-write soak, SECONDS=3600 for each barrier and copy-on-write
	KSMALLOC_SOAK_SECONDS=$(SECONDS) $(BIN)/pytest -s tests/test_soak.py

growth: build ## memory that is rewritten and merged over and over, SECONDS=3600 long
	KSMALLOC_GROWTH_SECONDS=$(SECONDS) $(BIN)/pytest -s tests/test_growth.py

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
