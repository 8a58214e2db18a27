# The commands of the README. Each sets up what it needs (a virtual environment in .venv with torch and the
# packages of requirements-dev.txt, then the extension, built in place) and skips what is done already.
# The last line of a step's recipe writes its stamp, so a failed step runs again. Settings: see `make help`.

TORCH   ?= 2.13.0
PYTHON  ?= python3
VENV    ?= .venv
ARGS    ?=
PIPARGS ?=

BIN     := $(VENV)/bin/python
BASE    := $(if $(wildcard $(BIN)),$(BIN),$(PYTHON))
SETUP   := $(VENV)/stamp-torch-$(TORCH)
BUILD   := build/stamp$(subst /,-,$(VENV))
CSRC    := $(shell find csrc -type f 2>/dev/null)
SOURCES := setup.py pyproject.toml $(CSRC)

.PHONY: help demo test bench bench-peers phases test-avx512 sanitize sanitize-memory sanitize-threads build clean distclean
.PHONY: check force format gpu lint wheel test-clients test-versions test-newest
.NOTPARALLEL:

help:
	@echo 'make demo       train a character model with torch.nn.LSTM, then with fusedrnn.LSTM, and compare the two'
	@echo 'make test       run every test'
	@echo 'make lint       check the form of the sources (make format: give it)'
	@echo 'make wheel      build one wheel for every torch and Python that are supported, and try it'
	@echo 'make test-versions  test that wheel under each of them (make test-newest: build and test with the newest torch)'
	@echo 'make test-clients  run other libraries unchanged on torch.nn patched: the same losses, both times'
	@echo 'make bench      time fusedrnn against torch.nn, layer by layer (make bench-peers: ONNX Runtime and OpenVINO)'
	@echo 'make phases     time fusedrnn with timers inside: where the time of a layer goes'
	@echo 'make test-avx512  run the tests on the AVX-512 kernels, compiled for AVX2'
	@echo 'make sanitize   run the tests with AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer'
	@echo 'make gpu        build, test, check and time the CUDA kernels, with the torch of the active environment'
	@echo 'make build      set up and compile only (the others do so by themselves)'
	@echo 'make clean      delete what was compiled; make distclean: the virtual environment too'
	@echo
	@echo 'ARGS=...        arguments of the command: make demo ARGS="--cell gru", make test ARGS="-k lstm"'
	@echo 'TORCH=$(TORCH)    version of torch;  PYTHON=$(PYTHON)  the Python to set up with;  VENV=$(VENV)  where'
	@echo 'PIPARGS=...     arguments of pip install, such as an index that has torch without CUDA'

demo: $(BUILD)
	@$(BIN) examples/char_lm.py $(ARGS)

test: $(BUILD)
	@$(BIN) -m pytest $(ARGS)

# Names, imports, line lengths, layout: the settings are in pyproject.toml and .clang-format.
lint: $(SETUP)
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check --quiet . && $(VENV)/bin/clang-format --dry-run --Werror $(CSRC) benchmarks/*.cpp tests/persistent/*.cpp || { \
	  echo 'error: make format gives these files their form' >&2; exit 1; }

format: $(SETUP)
	@$(VENV)/bin/ruff check --fix --quiet .
	@$(VENV)/bin/ruff format --quiet .
	@$(VENV)/bin/clang-format -i $(CSRC) benchmarks/*.cpp tests/persistent/*.cpp

# One wheel for every torch and Python that are supported, in dist/.
WHEEL := $(VENV)/stamp-wheel
$(WHEEL): requirements-wheel.txt | $(SETUP)
	@$(BIN) -m pip install --quiet --disable-pip-version-check $(PIPARGS) -r requirements-wheel.txt
	@touch $@

wheel: $(WHEEL) | check
	@$(BIN) -m release.wheel --try-with $(TORCH) $(ARGS)

# That wheel under every torch and Python, each in an environment of its own; the table is docs/versions.md.
test-versions:
	@$(PYTHON) -m release.versions $(ARGS)

# Built from the sources: the newest torch, with this Python and the most telling tests. Part of .ci/run.
test-newest:
	@$(PYTHON) -m release.versions --newest $(ARGS)

# Third-party libraries in an environment of their own, with the same Python and torch, so the same extension.
CLIENTS := $(VENV)-clients
$(CLIENTS)/stamp-torch-$(TORCH): requirements-clients.txt requirements-dev.txt | $(SETUP)
	@echo 'installing torch $(TORCH) and requirements-clients.txt in $(CLIENTS)'
	@$(BIN) -m venv --clear $(CLIENTS)
	@$(CLIENTS)/bin/python -m pip install --quiet --disable-pip-version-check $(PIPARGS) torch==$(TORCH) \
	  -r requirements-dev.txt -r requirements-clients.txt
	@touch $@

test-clients: $(BUILD) $(CLIENTS)/stamp-torch-$(TORCH)
	@$(CLIENTS)/bin/python -m pytest -q -s tests/clients/*.py $(ARGS)

bench: $(BUILD)
	@$(BIN) -m benchmarks --plot out/benchmarks.png $(ARGS)

# Beside ONNX Runtime and OpenVINO.
PEERS := $(VENV)/stamp-peers
$(PEERS): requirements-peers.txt | $(SETUP)
	@echo 'installing requirements-peers.txt'
	@$(BIN) -m pip install --quiet --disable-pip-version-check $(PIPARGS) -r requirements-peers.txt
	@touch $@

bench-peers: $(BUILD) $(PEERS)
	@$(BIN) -m benchmarks.peers $(ARGS)
	$(if $(ARGS),,@$(BIN) -m benchmarks.int8)
	$(if $(ARGS),,@$(BIN) -m benchmarks.slstm --peers)

# A package apart, in build/NAME/lib, compiled with flags of its own: $(call variant,NAME,compiler flags,linker flags)
define variant
	@echo 'building the extension in build/$(1) (minutes the first time)'
	@mkdir -p build/$(1)
	@PATH="$(abspath $(VENV)/bin):$$PATH" FUSEDRNN_CXX_FLAGS='$(2)' FUSEDRNN_LD_FLAGS='$(3)' \
	  $(BIN) setup.py build --build-base build/$(1) --build-lib build/$(1)/lib >build/$(1)/log 2>&1 || { \
	  tail -n 60 build/$(1)/log; echo 'error: the build failed; all of its output is in build/$(1)/log' >&2; exit 1; }
endef
# The environment in which Python finds that package before the checkout's. (PYTHONSAFEPATH: Python 3.11 and newer.)
USING = cd build/$(1) && PYTHONSAFEPATH=1 PYTHONPATH="$(CURDIR)/build/$(1)/lib:$(CURDIR)"

phases: $(SETUP) | check
	$(call variant,phases,-DFUSEDRNN_PHASES $(FLAGS))
	@$(call USING,phases) $(abspath $(BIN)) -m benchmarks --phases $(ARGS)

# Everything there is to run on a machine with a GPU, in the environment that is active: its torch is for that GPU. It
# builds in a folder of its own.
gpu:
	@"$(PYTHON)" -m benchmarks.gpu $(ARGS)

# The AVX-512 kernels on a processor that has AVX2 alone: the same source, two registers a vector. No timing.
test-avx512: $(SETUP) | check
	$(call variant,test-avx512,-DFUSEDRNN_AVX2_AS_AVX512)
	@$(call USING,test-avx512) FUSEDRNN_CPU_ISA=avx512 \
	  $(abspath $(BIN)) -m pytest --rootdir $(CURDIR) -p no:cacheprovider $(CURDIR)/tests $(UNTIMED) $(ARGS)

sanitize: sanitize-memory sanitize-threads

# The peak is no peak here: the sanitizers slow the yardstick more than the products; and they keep what is freed. Three
# files would build something of their own, without these flags.
UNTIMED := --deselect tests/test_benchmarks.py::test_no_product_passes_the_peak --timeout 1200 \
  --deselect tests/test_memory_safety.py::test_calls_give_back_what_they_take \
  $(foreach name,recipe wheel cuda_build,--ignore $(CURDIR)/tests/test_$(name).py)

# AddressSanitizer and UndefinedBehaviorSanitizer, and the timers' tests.
ASAN := -fsanitize=address,undefined -fno-sanitize-recover=undefined
sanitize-memory: $(SETUP) | check
	$(call variant,sanitize-memory,-O1 -g1 -fno-omit-frame-pointer $(ASAN) -DFUSEDRNN_PHASES,$(ASAN))
	@$(call USING,sanitize-memory) ASAN_OPTIONS=detect_leaks=0:handle_segv=0:allocator_may_return_null=1 \
	  LD_PRELOAD="$$($${CXX:-c++} -print-file-name=libasan.so) $$($${CXX:-c++} -print-file-name=libstdc++.so)" \
	  $(abspath $(BIN)) -m pytest --rootdir $(CURDIR) -p no:cacheprovider $(CURDIR)/tests $(UNTIMED) $(ARGS)

# ThreadSanitizer sees data races in the kernels alone: torch, OpenMP and Python are not instrumented. (At exit, torch
# unlocks mutexes that it has destroyed: no reports on mutexes. It ends a forked process that starts threads.)
FORKS := --deselect "tests/test_threads.py::test_workers_of_a_data_loader_compute"
sanitize-threads: $(SETUP) | check
	$(call variant,sanitize-threads,-O1 -g1 -fsanitize=thread,-fsanitize=thread)
	@$(call USING,sanitize-threads) \
	  TSAN_OPTIONS="suppressions=$(CURDIR)/tests/tsan.supp report_mutex_bugs=0 handle_segv=0 die_after_fork=0" \
	  LD_PRELOAD="$$($${CXX:-c++} -print-file-name=libtsan.so)" setarch -R \
	  $(abspath $(BIN)) -m pytest --rootdir $(CURDIR) -p no:cacheprovider $(CURDIR)/tests $(UNTIMED) $(FORKS) $(ARGS)

build: $(BUILD)
	@echo 'built: fusedrnn for $(BIN)'

check:
ifneq ($(origin PYTHON),file)
	@test ! -x $(BIN) || test "$$($(PYTHON) -V)" = "$$($(BIN) -V)" || { echo \
	  "error: $(VENV) has $$($(BIN) -V), not that of $(PYTHON): name another VENV=... or make distclean" >&2; exit 1; }
endif

# Another TORCH or requirements-dev.txt means a new installation and a new build.
$(SETUP): requirements-dev.txt | check
	@command -v $(BASE) >/dev/null || { echo 'error: no $(BASE) here; name a Python with PYTHON=...' >&2; exit 1; }
	@$(BASE) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo \
	  "error: Python >= 3.10 needed, $(BASE) is $$($(BASE) -V 2>&1); name another with PYTHON=..." >&2; exit 1; }
	@test -f "$$($(BASE) -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h" || { echo \
	  'error: no Python.h for $(BASE): install its development headers (python3-dev, python3-devel)' >&2; exit 1; }
	@echo 'int main() { return []<class T>(T x) { return x; }(0); }' | $${CXX:-c++} -std=c++20 -x c++ -fsyntax-only - || { echo \
	  "error: $${CXX:-c++} compiles no C++20: install g++ >= 10 or name a compiler with CXX=..." >&2; exit 1; }
	@rm -f $(VENV)/stamp-*
	@$(BIN) -m pip --version >/dev/null 2>&1 || { echo 'setting up $(VENV)'; $(PYTHON) -m venv --clear $(VENV); } || { \
	  echo 'error: $(PYTHON) makes no virtual environment (is python3-venv missing?)' >&2; rm -rf $(VENV); exit 1; }
	@echo 'installing torch $(TORCH) and requirements-dev.txt'
	@$(BIN) -m pip install --quiet --disable-pip-version-check $(PIPARGS) torch==$(TORCH) -r requirements-dev.txt
	@echo '$(CURDIR)' > "$$($(BIN) -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/fusedrnn-checkout.pth"
	@rm -rf build fusedrnn/_ops.* fusedrnn/_fast*
	@touch $@

# build/ keeps the objects, and ninja compiles only what changed. The compiler's output is in build/log.
$(BUILD): $(SETUP) $(SOURCES) $(if $(wildcard fusedrnn/_ops*.so),,force) | check
	@echo 'building the extension (minutes the first time)'
	@mkdir -p build && rm -f build/stamp* fusedrnn/_C*.so
	@PATH="$(abspath $(VENV)/bin):$$PATH" $(BIN) setup.py egg_info build_ext --inplace >build/log 2>&1 || { \
	  tail -n 60 build/log; echo 'error: the build failed; all of its output is in build/log' >&2; exit 1; }
	@grep -A 4 '$(CURDIR)/csrc/.*warning:' build/log || true
	@touch $@

clean:
	rm -rf build dist out fusedrnn/_ops.* fusedrnn/_fast* fusedrnn.egg-info

distclean: clean
	rm -rf $(VENV) $(CLIENTS)
