# Each target is one command on a fresh machine: it makes its own environment in .venv and builds the extension there.
#   make demo    train, certify, summarise, plot          make bench   the speed tables
#   make test    the whole test suite                     make lint    ruff and mypy
#   make test-all   with the tests that take minutes      make mutants   do the tests see defects?  Goes on where it was
#   make gpu     on a machine with a CUDA card: the tests that need one, compute-sanitizer where it is, the speed tables
#   make wheel   for any torch from 2.11 on, in dist      make wheel-test   its operators beside the newest torch
# Other versions:  make test VENV=.venv-2.11 TORCH="torch==2.11.0 torchvision==0.26.0"
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch torchvision
BIN := $(VENV)/bin
DEMO := demo-out
SOURCES := $(wildcard csrc/*.* csrc/*/*.h cmake/*) CMakeLists.txt pyproject.toml

.PHONY: demo test test-all mutants bench gpu lint wheel wheel-test sanitize clean

# The Python files are used in place; only a change of the compiled sources or of the dependencies installs again.
$(BIN)/.installed: $(SOURCES)
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 10) and 'pacd_fast needs Python 3.10 or later')"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet $(TORCH) "scikit-build-core>=0.10" "pybind11>=2.13" ninja cmake
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable ".[test,lint]"
	touch $@

demo: $(BIN)/.installed
	mkdir -p $(DEMO)
	rm -f $(DEMO)/model.safetensors $(DEMO)/results.tsv $(DEMO)/curve.png $(DEMO)/report.html
	$(BIN)/pacd-fast train --model mnist-cnn --data mnist5k --method gaussian --sigma 0.5 --epochs 20 --out $(DEMO)/model.safetensors
	$(BIN)/pacd-fast certify --checkpoint $(DEMO)/model.safetensors --data mnist5k --split test --count 20 --n 100000 --out $(DEMO)/results.tsv
	$(BIN)/pacd-fast summary $(DEMO)/results.tsv
	$(BIN)/pacd-fast plot $(DEMO)/results.tsv --title "MNIST CNN, sigma 0.5, n = 100 000" --out $(DEMO)/curve.png
	$(BIN)/pacd-fast report $(DEMO)/results.tsv --data mnist5k --out $(DEMO)/report.html

# One process a core, of one thread each: most tests are too small for two threads.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist worksteal
test: $(BIN)/.installed
	$(PYTEST)

test-all: $(BIN)/.installed
	$(PYTEST) -m "slow or not slow"

# Two hours at most, on one core; MUTANTS=soft.py: those whose name or file says so.
mutants: $(BIN)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/mutants.py $(MUTANTS)

bench: $(BIN)/.installed
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable ".[bench]"
	$(BIN)/python -m benchmarks

# A missing card is a failure.  The sanitizer looks at our kernels alone.
gpu: $(BIN)/.installed
	PACD_REQUIRE_CUDA=1 $(BIN)/python -m pytest -m cuda
	if command -v compute-sanitizer; then for tool in memcheck racecheck synccheck; do \
	  PACD_REQUIRE_CUDA=1 PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $$tool --error-exitcode 1 \
	  --kernel-regex kns=pacd $(BIN)/python -m pytest -m cuda $(CURDIR)/python_tests/test_cuda.py -k bits \
	  || exit 1; done; else echo "compute-sanitizer is not on PATH: left out"; fi
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable ".[bench]"
	$(BIN)/python -m benchmarks bench_ops bench_certify bench_labelflip bench_training bench_metapoison
	for network in resnet20 resnet110; do $(BIN)/python -m benchmarks.bench_certify $$network || exit 1; done

lint: $(BIN)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The operator, layer and bound tests under the address and undefined behaviour sanitizers, in an environment of their
# own that sees the other one's packages, but not its editable install.
SANITIZE := $(CURDIR)/build/sanitize
sanitize: $(BIN)/.installed
	rm -rf $(SANITIZE)
	$(BIN)/python -m venv $(SANITIZE)
	$(BIN)/python -c "import site; print(site.getsitepackages()[0])" > $(SANITIZE)/packages.txt
	cp $(SANITIZE)/packages.txt "$$($(SANITIZE)/bin/python -c 'import site; print(site.getsitepackages()[0])')/base.pth"
	$(SANITIZE)/bin/python -m pip install --quiet --no-build-isolation --no-deps . \
	  -C cmake.define.PACD_SANITIZE=ON -C cmake.define.PACD_CUDA=OFF -C build-dir=$(SANITIZE)/objects
	cd $(SANITIZE) && export LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so)" \
	  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 && \
	  bin/python -c "from pacd_fast._C import build_info; assert build_info()['sanitized']; print('sanitized build')" && \
	  bin/python -m pytest -q -p no:cacheprovider -c $(CURDIR)/pyproject.toml --rootdir $(CURDIR) \
	  $(CURDIR)/python_tests/test_ops.py $(CURDIR)/python_tests/test_bounds.py \
	  $(CURDIR)/python_tests/test_layers.py

# One wheel for every torch from the oldest that is promised on: built beside that one, which is not imported and needs
# nothing of what it depends on; tested beside TORCH, by default the newest, where the wheel alone is installed.
OLDEST ?= torch==2.11.0
WHEEL := $(CURDIR)/build/wheel
wheel:
	rm -rf $(WHEEL) dist
	$(PYTHON) -m venv $(WHEEL)
	$(WHEEL)/bin/python -m pip install --quiet --no-deps "$(OLDEST)"
	$(WHEEL)/bin/python -m pip install --quiet "scikit-build-core>=0.10" "pybind11>=2.13" ninja cmake
	PATH=$(WHEEL)/bin:$$PATH $(WHEEL)/bin/python -m pip wheel --quiet --no-build-isolation --no-deps --wheel-dir dist . \
	  -C build-dir=$(WHEEL)/objects

wheel-test: wheel
	rm -rf $(WHEEL)-test
	$(PYTHON) -m venv $(WHEEL)-test
	$(WHEEL)-test/bin/python -m pip install --quiet $(TORCH) pytest mpmath dist/pacd_fast-*.whl
	cd $(WHEEL)-test && bin/python -c "import torch, pacd_fast; print('torch', torch.__version__, pacd_fast.__file__); \
	  assert pacd_fast.__file__.startswith('$(WHEEL)-test')" && \
	  bin/python -m pytest -q -p no:cacheprovider -c $(CURDIR)/pyproject.toml --rootdir $(CURDIR) \
	  $(CURDIR)/python_tests/test_ops.py $(CURDIR)/python_tests/test_bounds.py $(CURDIR)/python_tests/test_layers.py

clean:
	rm -rf build dist $(DEMO) $(VENV)
