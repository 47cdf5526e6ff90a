# make demo     set up, train a language model and a vision transformer, show what they learned
# make test     set up, build everything, run the tests
# The rest: setup build compile-commands lint format docs test-sanitize test-avx2 test-abi test-transformers test-hub hub bench cuda-report gpu-check wheel wheel-check sdist clean

PYTHON ?= python3
VENV ?= .venv
ABI_VENV ?= .venv-abi
# What `make test` is known to pass with (pyproject.toml says what the package accepts), and the other
# version that the same binary must load under.
TORCH ?= torch==2.14.1
TORCHVISION ?= torchvision==0.29.1
ABI_TORCH ?= torch==2.13.0
# The oldest and the newest transformers that are known to work (bigkernel/integrations/contract.py).
TRANSFORMERS ?= 5.23.0 5.24.0
RUNS ?= runs
PYTEST_ARGS ?=
# Test processes share the cores: idle threads must sleep, not spin.
PYTEST := OMP_WAIT_POLICY=passive $(VENV)/bin/pytest -n logical --maxprocesses 4 --dist loadgroup

BIN := $(VENV)/bin
BIGKERNEL := $(BIN)/bigkernel
# --no-compile: byte code is made when a module is first imported, not for all of PyTorch at once.
# It has to be kept then: each process would otherwise compile PyTorch's sources again, for seconds.
unexport PYTHONDONTWRITEBYTECODE
PIP_INSTALL := $(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check
BUILD_EXT := $(BIN)/python setup.py --quiet build_ext --inplace
# The demo builds the CUDA kernels only for a GPU that is there.
DEMO_CUDA := $(shell nvidia-smi -L >/dev/null 2>&1 || echo BIGKERNEL_CUDA=0)
export PYTHONUNBUFFERED = 1

.PHONY: demo test setup build compile-commands lint format docs test-sanitize test-avx2 test-abi test-transformers test-hub hub bench cuda-report gpu-check wheel wheel-check sdist clean

demo: $(VENV)/.demo
	@$(BIGKERNEL) env
	@$(BIGKERNEL) train text --preset demo --out $(RUNS)/demo-text --force
	@$(BIGKERNEL) generate $(RUNS)/demo-text --prompt "The for statement" --seed 1
	@$(BIGKERNEL) evaluate $(RUNS)/demo-text
	@$(BIGKERNEL) train text --sample zh --preset demo --out $(RUNS)/demo-zh --force
	@$(BIGKERNEL) generate $(RUNS)/demo-zh --prompt 这是我的第一篇AI博客 --seed 1
	@$(BIGKERNEL) train images --preset demo --out $(RUNS)/demo-images --force
	@$(BIGKERNEL) evaluate $(RUNS)/demo-images
	@echo "Trained models, plots and samples are in $(RUNS)/demo-text, $(RUNS)/demo-zh and $(RUNS)/demo-images."

test: build
	$(PYTEST) $(PYTEST_ARGS)

setup: build

$(VENV)/.torch:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "bigkernel needs Python 3.11 or later; choose one: make PYTHON=python3.12 ..."; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { echo "python3-venv is missing: apt install python3-venv"; exit 1; }
	@echo "Installing PyTorch into $(VENV) ..."
	@$(PIP_INSTALL) "$(TORCH)" numpy "setuptools>=77" wheel "ninja>=1.11"
	@touch $@

# The compiler and pip's downloads go on side by side.
$(VENV)/.demo: $(VENV)/.torch pyproject.toml setup.py $(shell find csrc -type f)
	@echo "Compiling the kernels and installing the other dependencies ..."
	@{ $(DEMO_CUDA) $(BUILD_EXT) >build.log 2>&1; echo $$? >$(VENV)/.build_status; } & \
	  BIGKERNEL_NATIVE=0 $(PIP_INSTALL) --no-build-isolation -e '.[all]' && wait
	@grep '^bigkernel:' build.log || true
	@test "$$(cat $(VENV)/.build_status)" = 0 || { tail -40 build.log; exit 1; }
	@touch $@

$(VENV)/.test: $(VENV)/.torch pyproject.toml
	@echo "Installing the test dependencies ..."
	@BIGKERNEL_NATIVE=0 $(PIP_INSTALL) --no-build-isolation "$(TORCH)" "$(TORCHVISION)" -e '.[test]'
	@touch $@

build: $(VENV)/.test
	@$(BUILD_EXT) >build.log 2>&1 || { tail -40 build.log; exit 1; }
	@grep '^bigkernel:' build.log

# build/compile_commands.json, with which an editor opens each file of csrc as setup.py compiles it.
# ISA=avx512 shows the bodies of the CPU kernels as they are for AVX-512.
ISA ?= portable
compile-commands: $(VENV)/.test
	$(BIN)/python tools/compile_commands.py $(ISA)

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $$(git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu')

format: $(VENV)/.test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu')

# The CPU kernels under AddressSanitizer and UBSan, in a build folder of their own. Python itself is
# not instrumented, hence the preload; its own allocations at exit are not leaks of ours. Left out is
# what has no code of its own (`linear`), and what is about the memory that a call takes, other
# libraries or several processes: the same calls as elsewhere.
SANITIZED := build/sanitize
test-sanitize: $(VENV)/.test
	BIGKERNEL_SANITIZE=1 BIGKERNEL_CUDA=0 $(BIN)/python setup.py --quiet build \
	  --build-lib $(SANITIZED)/lib --build-temp $(SANITIZED)/temp >build.log 2>&1 || { tail -40 build.log; exit 1; }
	BIGKERNEL_EXPECT_SANITIZER=1 ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 \
	  UBSAN_OPTIONS=print_stacktrace=1 HYPOTHESIS_PROFILE=sanitize \
	  LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libstdc++.so)" \
	  $(PYTEST) -o pythonpath=$(SANITIZED)/lib tests/ops --ignore tests/ops/test_cuda_report.py --ignore tests/ops/test_linear.py \
	  -k "not (compile or opcheck or ptx or kernel or memory or sequences_fit or is_transformers or two_ranks)" $(PYTEST_ARGS)

# The op tests as on a processor without AVX-512: our kernels and torch's, which has no 16-bit
# product there.
AVX2 := BIGKERNEL_CPU_ISA=avx2 ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2
test-avx2: build
	$(AVX2) $(PYTEST) tests/ops $(PYTEST_ARGS)

# One binary, two versions of PyTorch.
test-abi: build $(ABI_VENV)/.torch
	$(BIN)/python tests/check_abi.py --audit $(BIN)/torch-abi-audit $(BIN)/python $(ABI_VENV)/bin/python

$(ABI_VENV)/.torch:
	@$(PYTHON) -m venv $(ABI_VENV)
	@$(ABI_VENV)/bin/python -m pip install --quiet --no-compile "$(ABI_TORCH)" numpy
	@touch $@

# The Trainer and attention in models, at both ends of the supported transformers. The quick part;
# TRANSFORMERS_ARGS=--all for all of it.
test-transformers: build
	OMP_WAIT_POLICY=passive $(BIN)/python tests/check_transformers.py $(TRANSFORMERS_ARGS) $(TRANSFORMERS)

# A kernel of Hugging Face's hub, in build/hub, which transformers loads.
hub: build
	@PYTHONPATH=. $(BIN)/python tools/hub.py

# With the package that loads it, beside the environment: most of what that needs is for signatures.
KERNELS ?= kernels>=0.17.2,<0.19
test-hub: build
	@$(PIP_INSTALL) --upgrade --no-deps --target build/kernels "$(KERNELS)" tomlkit
	PYTHONPATH=$(CURDIR)/build/kernels $(PYTEST) tests/test_hub.py $(PYTEST_ARGS)

bench: build
	BIGKERNEL_NATIVE=0 $(PIP_INSTALL) --no-build-isolation "$(TORCH)" "$(TORCHVISION)" -e '.[bench]'
	$(BIN)/python -m pytest benchmarks -m bench --benchmark-json benchmarks/results/latest.json $(PYTEST_ARGS)

# The documentation, in build/docs/index.html. Nothing is fetched while it is built or read, and a
# link or a reference that leads nowhere is an error.
docs: $(VENV)/.docs
	$(BIN)/python -m sphinx --quiet --fail-on-warning --keep-going --nitpicky --fresh-env docs build/docs
	$(BIN)/python docs/_check.py build/docs

$(VENV)/.docs: $(VENV)/.torch pyproject.toml
	@echo "Installing what the documentation is built with ..."
	@BIGKERNEL_NATIVE=0 $(PIP_INSTALL) --no-build-isolation "$(TORCH)" -e '.[docs]'
	@touch $@

# Counts what the CUDA kernels take and do, with nvcc and without a GPU. ARCH=all, every architecture
# that we build for, makes the record in benchmarks/results; fewer are written to build/cuda-report.
ARCH ?= sm_80
cuda-report: $(VENV)/.test
	PYTHONPATH=. $(BIN)/python tools/cuda_report.py --arch $(ARCH)

# For a machine with a GPU: measures, tests and sanitizes in ten minutes, with what is installed there.
# make gpu-check GPU_CHECK_ARGS="--budget 200 --only attention,tests"; --help says more.
GPU_CHECK_ARGS ?=
gpu-check:
	$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) tools/gpu_check.py $(GPU_CHECK_ARGS)

# One for every Python 3 and every torch from 2.11 on. What an earlier one left is not packed again.
wheel: $(VENV)/.torch
	@rm -rf build/lib* build/bdist*
	TORCH_CUDA_ARCH_LIST="$${TORCH_CUDA_ARCH_LIST:-all}" $(BIN)/python tools/build_cost.py \
	  $(BIN)/python -m pip wheel --no-build-isolation --no-deps --wheel-dir dist .
	@$(BIN)/python tools/wheel_info.py "$$(ls -t dist/bigkernel-*.whl | head -1)"

# The newest wheel in fresh environments, for each Python that is here with each torch:
# make wheel-check CELLS="3.12:2.13.0" for one of them.
CELLS ?=
wheel-check: $(VENV)/.torch
	OMP_WAIT_POLICY=passive $(BIN)/python tools/wheel_check.py "$$(ls -t dist/bigkernel-*manylinux*.whl | head -1)" $(CELLS)

# Sources, tests and documentation in one archive; needs neither a compiler nor nvcc.
sdist: $(VENV)/.torch
	BIGKERNEL_NATIVE=0 $(BIN)/python setup.py --quiet sdist

clean:
	rm -rf build dist docs/_generated build.log bigkernel/libbigkernel_ops.so $(VENV)/.demo
