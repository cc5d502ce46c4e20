# Every target works from a fresh checkout on a machine with Python 3.10 or later, g++ and make: what else is needed goes into a
# virtual environment in this folder, made on first use. Another Python or torch: make test PYTHON=python3.12 TORCH=torch==2.11.0

PYTHON ?= python3
# pinned, as plain "torch" takes whatever is newest
TORCH ?= torch==2.13.0
# without build isolation, which would download a second torch, pip does not install these for us
BUILD_TOOLS := setuptools==84.2.1 ninja==1.13.2

VENV := .venv-test
BIN := $(VENV)/bin
# no bytecode beforehand, since most of what torch and the others bring is never imported: written as it is, once for all processes
INSTALL := $(BIN)/python -m pip --disable-pip-version-check install --quiet --no-compile
SOURCES := $(shell find csrc -type f) pyproject.toml setup.py
CPP_SOURCES := $(shell find csrc tests/cpp benchmarks examples -name '*.cpp' -o -name '*.h' -o -name '*.c')

# ninja would look for the job server that make --jobs does not pass on to it
unexport MAKEFLAGS
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help demo test check lint core-address core-thread proof bench bench-peers format clean FORCE
.DEFAULT_GOAL := help

help:
	@echo 'make demo    quantize a trained character model and show what was gained and lost'
	@echo 'make test    build the package and run its tests'
	@echo 'make check   linters, type checker, and the C++ core: warnings as errors, its tests under sanitizers'
	@echo 'make proof   compare 50 million values with the integer reference, for every ISA and 1 and 2 threads (some minutes)'
	@echo 'make bench   time this package beside float32, quantize_dynamic and the FX reference (BENCH="--quick" for less)'
	@echo 'make bench-peers  the same beside ONNX Runtime and ncnn, which it installs'
	@echo 'make format  format all sources'
	@echo 'make clean   remove the virtual environment and everything built'

demo: $(VENV)/installed
	$(BIN)/python examples/char_lm/demo.py

test: $(VENV)/installed
	$(BIN)/python -m pytest --numprocesses 2 $(PYTEST)

check: lint core-address core-thread

lint: $(VENV)/installed
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CPP_SOURCES)

# The C++ core without torch, with its tests, under sanitizers.
CORE = $(BIN)/cmake -S . -B build/$@ -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN)/ninja) -DCMAKE_BUILD_TYPE=Release \
	-DCMAKE_COMPILE_WARNING_AS_ERROR=ON

# float-cast-overflow is not part of undefined
core-address: SANITIZE := address,undefined,float-cast-overflow
core-thread: SANITIZE := thread
core-address core-thread: $(VENV)/installed
	$(CORE) -DLSTM_QUANT_SANITIZE=$(SANITIZE)
	$(BIN)/cmake --build build/$@
	$(BIN)/ctest --test-dir build/$@ --output-on-failure

proof: $(VENV)/installed
	KERNEL_TEST_VALUES=50000000 $(BIN)/python -m pytest -s tests/test_kernel.py

bench: $(VENV)/installed
	$(BIN)/python benchmarks/bench.py $(BENCH)

bench-peers: $(VENV)/peers
	$(BIN)/python benchmarks/bench.py --peers $(BENCH)

format: $(VENV)/installed
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/clang-format -i $(CPP_SOURCES)

clean:
	rm -rf $(VENV) build *.egg-info torch_lstm_quant/*.so

# The environment is made anew when another Python or torch is asked for than the last time.
$(VENV)/request: FORCE
	@echo '$(PYTHON) $(TORCH)' | cmp -s - $@ \
		|| { rm -rf $(VENV) && $(PYTHON) -m venv $(VENV) && echo '$(PYTHON) $(TORCH)' > $@; }

$(VENV)/tools: $(VENV)/request Makefile
	$(INSTALL) $(TORCH) $(BUILD_TOOLS)
	touch $@

# Python sources are used where they are, so only what is compiled, or says what to install, makes this run again.
$(VENV)/installed: $(VENV)/tools $(SOURCES)
	$(INSTALL) --no-build-isolation --editable '.[test,check,demo]'
	touch $@

# The package is there already, so that this adds what its extra names and compiles nothing.
$(VENV)/peers: $(VENV)/installed
	$(INSTALL) 'torch-lstm-quant[peers]'
	touch $@
