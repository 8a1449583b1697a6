# make demo and make test do everything, from a fresh clone on: system packages (as root, on Debian and Ubuntu), a
# virtual environment with PyTorch, the build, the run. What is up to date is not done again.
#
#   TORCH=2.13.0    the PyTorch to install into the virtual environment; TORCH=system: use the active environment
#   PYTHON=python3  the interpreter that makes the virtual environment
#   VENV=.venv      where
#   MAX_JOBS=2      compilers that run at once; default: one per core
#   CUDA=AUTO       ON, OFF or AUTO: CUDA kernels in the Python package; AUTO: where a CUDA compiler is found
TORCH ?= 2.13.0
PYTHON ?= python3
VENV ?= .venv
CUDA ?= AUTO
export MAX_JOBS ?= $(shell nproc)

BUILD := build
ifeq ($(TORCH),system)
  PY := $(shell $(PYTHON) -c 'import sys; print(sys.executable)')
  NEEDS_VENV :=
else
  PY := $(VENV)/bin/python
  NEEDS_VENV := $(PYTHON)
  export PATH := $(abspath $(VENV))/bin:$(PATH)
endif

CPP_SOURCES := CMakeLists.txt $(shell find cmake include src bindings -type f)
TEST_SOURCES := $(shell find tests/cpp tests/emulator tests/fuzz examples/c examples/cpp examples/ctypes -type f)
# The C++ tests run the CUDA kernels through the emulator, which needs no CUDA compiler.
CONFIGURE = cmake -S . -G Ninja -DFLASH_DMATTN_BUILD_TESTING=ON -DFLASH_DMATTN_CUDA=OFF \
  -DPython_EXECUTABLE=$(abspath $(PY))

.PHONY: help demo test test-cpp test-sanitize test-tsan-short test-python test-emulated test-tsan fuzz test-gpu \
  sanitize-gpu bench bench-cpp build clean distclean
help:
	@echo "make demo           train a small language model on real text and draw what it learned (demo_out/)"
	@echo "make test           every test: C++, C++ under sanitizers, Python, CUDA kernels on the CPU"
	@echo "make test-cpp, test-sanitize, test-tsan-short, test-python, test-emulated   one of the five"
	@echo "make test-tsan      the C++ suites under ThreadSanitizer, concurrent calls many times over"
	@echo "make fuzz           libFuzzer on the C interface; needs Clang; FUZZ_SECONDS=600 for each of three targets"
	@echo "make test-gpu       what judges kernels, on a GPU; the report goes to tests/gpu/results/gpu.json"
	@echo "make sanitize-gpu   every CUDA kernel under compute-sanitizer, on a GPU"
	@echo "make bench          benchmarks beside PyTorch's attention; ARGS=... goes to benchmarks/run.py"
	@echo "make bench-cpp      micro-benchmarks of the C++ library; ARGS=... goes to Google Benchmark"
	@echo "make build          the Python package, editable, in the virtual environment"
	@echo "make clean          remove build/;  make distclean: and the virtual environment"
	@sed -n '/^#   /s/^#  //p' $(firstword $(MAKEFILE_LIST))

demo: $(BUILD)/package.stamp
	$(PY) examples/demo/train.py $(ARGS)

test: test-cpp test-sanitize test-tsan-short test-python test-emulated

# The counts of what ran are printed by the tests themselves, hence -V.
test-cpp: $(BUILD)/cpp.stamp
	GTEST_BRIEF=1 ctest --test-dir $(BUILD)/cpp -V -j $(MAX_JOBS)

test-sanitize: $(BUILD)/sanitize.stamp
	GTEST_BRIEF=1 ctest --test-dir $(BUILD)/sanitize -V -j $(MAX_JOBS)

# Concurrent calls; test-tsan: everything, and they go on for longer.
test-tsan-short: $(BUILD)/tsan.stamp
	GTEST_BRIEF=1 ctest --test-dir $(BUILD)/tsan -V -R concurrency_test

test-tsan: $(BUILD)/tsan.stamp
	cmake --build $(BUILD)/tsan
	FLASH_DMATTN_TEST_ROUNDS=50 GTEST_BRIEF=1 ctest --test-dir $(BUILD)/tsan -V -j $(MAX_JOBS)

# Inputs that reach something new are kept in build/fuzz/corpus, one that fails in build/fuzz.
FUZZ_SECONDS ?= 600
fuzz: $(BUILD)/fuzz.stamp
	set -e; for target in validation selection attention; do \
	  mkdir -p $(BUILD)/fuzz/corpus/$$target; \
	  $(BUILD)/fuzz/tests/fuzz/fuzz_$$target -max_total_time=$(FUZZ_SECONDS) -max_len=512 -len_control=0 -timeout=30 \
	    -print_final_stats=1 -artifact_prefix=$(BUILD)/fuzz/$$target- $(BUILD)/fuzz/corpus/$$target; \
	done

test-python: $(BUILD)/package.stamp $(BUILD)/cpp.stamp
	FLASH_DMATTN_BUGS_LIBRARY=$(abspath $(BUILD))/cpp/libflash_dmattn_torch_bugs.so $(PY) -m pytest $(ARGS)

# The CUDA kernels, run by the emulator.
test-emulated: $(BUILD)/package.stamp $(BUILD)/cpp.stamp
	FLASH_DMATTN_EMULATED_LIBRARY=$(abspath $(BUILD))/cpp/libflash_dmattn_torch_emulated.so \
	  $(PY) -m pytest tests/python --kernel cuda-emulated --no-bug-library $(ARGS)

test-gpu: $(BUILD)/package.stamp
	PYTHON=$(PY) scripts/test_gpu.sh $(ARGS)

sanitize-gpu: $(BUILD)/environment.stamp
	cmake -S . -G Ninja -B $(BUILD)/cuda -DFLASH_DMATTN_BUILD_TESTING=ON -DFLASH_DMATTN_CUDA=ON
	cmake --build $(BUILD)/cuda --target flash_dmattn_smoke
	scripts/sanitize_gpu.sh $(BUILD)/cuda/tests/gpu/flash_dmattn_smoke

bench: $(BUILD)/package.stamp
	$(PY) benchmarks/run.py $(ARGS)

bench-cpp: $(BUILD)/cpp.stamp
	$(BUILD)/cpp/tests/cpp/flash_dmattn_bench $(ARGS)

build: $(BUILD)/package.stamp

$(BUILD)/system.stamp: scripts/install_system_packages.sh
	scripts/install_system_packages.sh $(NEEDS_VENV)
	@mkdir -p $(@D) && touch $@

# A change of TORCH, VENV or CUDA makes the environment, and so everything built against it, anew.
ENVIRONMENT := $(TORCH) $(abspath $(PY)) CUDA=$(CUDA)
ifneq ($(ENVIRONMENT),$(file < $(BUILD)/environment.name))
  $(shell mkdir -p $(BUILD) && printf '%s' '$(ENVIRONMENT)' > $(BUILD)/environment.name)
endif

$(BUILD)/environment.stamp: $(BUILD)/environment.name $(BUILD)/system.stamp pyproject.toml
ifneq ($(TORCH),system)
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet 'torch==$(TORCH)'
endif
	$(PY) -m pip install --quiet scikit-build-core ninja
	@touch $@

$(BUILD)/package.stamp: $(BUILD)/environment.stamp $(CPP_SOURCES)
	SKBUILD_CMAKE_DEFINE=FLASH_DMATTN_CUDA=$(CUDA) $(PY) -m pip install --quiet --no-build-isolation -e '.[test,demo]'
	@touch $@

$(BUILD)/cpp.stamp: $(BUILD)/environment.stamp $(CPP_SOURCES) $(TEST_SOURCES)
	$(CONFIGURE) -B $(BUILD)/cpp -DFLASH_DMATTN_BUILD_TORCH=ON -DBUILD_SHARED_LIBS=ON
	cmake --build $(BUILD)/cpp
	@touch $@

$(BUILD)/sanitize.stamp: $(BUILD)/environment.stamp $(CPP_SOURCES) $(TEST_SOURCES)
	$(CONFIGURE) -B $(BUILD)/sanitize -DFLASH_DMATTN_SANITIZE=address,undefined -DFLASH_DMATTN_WERROR=ON \
	  -DCMAKE_BUILD_TYPE=Debug -DCMAKE_CXX_FLAGS_DEBUG=-O1
	cmake --build $(BUILD)/sanitize
	@touch $@

$(BUILD)/tsan.stamp: $(BUILD)/environment.stamp $(CPP_SOURCES) $(TEST_SOURCES)
	$(CONFIGURE) -B $(BUILD)/tsan -DFLASH_DMATTN_SANITIZE=thread -DCMAKE_BUILD_TYPE=Debug -DCMAKE_CXX_FLAGS_DEBUG=-O1
	cmake --build $(BUILD)/tsan --target concurrency_test
	@touch $@

# Kernels for this machine's instruction set alone: each takes Clang minutes to instrument.
$(BUILD)/fuzz.stamp: $(BUILD)/environment.stamp $(CPP_SOURCES) $(TEST_SOURCES)
	$(CONFIGURE) -B $(BUILD)/fuzz -DCMAKE_C_COMPILER=clang -DCMAKE_CXX_COMPILER=clang++ \
	  -DFLASH_DMATTN_SANITIZE=fuzzer-no-link,address,undefined -DCMAKE_BUILD_TYPE=Debug -DCMAKE_CXX_FLAGS_DEBUG=-O1 \
	  "-DCMAKE_CXX_FLAGS=-march=native -DHWY_COMPILE_ONLY_STATIC"
	cmake --build $(BUILD)/fuzz --target fuzz_validation fuzz_selection fuzz_attention
	@touch $@

clean:
	rm -rf $(BUILD)

distclean: clean
	rm -rf $(VENV)
