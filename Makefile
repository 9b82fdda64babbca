# make train   a GPT-2 trained on this machine, from nothing
# make test    lint and the whole test suite
# make lint    ruff, mypy, clang-format
# make format  what lint asks for
# make gpu     on a machine with a GPU, in the Python it is given (PYTHON=): all that needs one; installs nothing
#              (GPU="--budget 480 --out DIR"; tools/gpu.py --help)
# make gpu-carry   builds what that takes along to a machine without compiler or network, for CARRY_TORCH and sm_90
# make bench   the benchmarks beside their peers (pytest-benchmark), into benchmarks/results: bench-step,
#              bench-dtensors, bench-forms, bench-comm, bench-zero, bench-scaling (1M to 1024M parameters, 1 to 10,000 tensors,
#              1 to 4 ranks) and bench-quality (what storage forms do to training) (ATEN_CPU_CAPABILITY=avx2 make bench-step; make bench-step BENCH="-k adamw" RESULTS=/tmp)
# make readme  the generated tables and charts of README.md and docs/, from those

PYTHON ?= python3
TORCH  ?= torch==2.13.0
VENV   ?= .venv
BIN    := $(VENV)/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1
CXX_FILES := $(shell git ls-files "*.h" "*.cpp" "*.cu" "*.cuh")

.PHONY: help train test wheel lint format gpu gpu-carry bench bench-step bench-dtensors bench-forms bench-quality bench-comm bench-zero bench-scaling readme clean
help:
	@sed -n 's/^# //p' Makefile

# torch first and by itself: the same command then works with any build of it (make TORCH=torch==2.11.0 …).
$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	@touch $@

$(VENV)/.train: $(VENV)/.torch pyproject.toml setup.py
	@echo "installing deepfast[train] into $(VENV)"
	$(BIN)/python -m pip install --quiet --editable ".[train]"
	@touch $@

$(VENV)/.dev: $(VENV)/.torch pyproject.toml setup.py
	@echo "installing deepfast[train,test,dev] into $(VENV)"
	$(BIN)/python -m pip install --quiet --editable ".[train,test,dev]"
	@touch $@ $(VENV)/.train

$(VENV)/.bench: $(VENV)/.dev
	@echo "installing deepfast[bench] into $(VENV)"
	$(BIN)/python -m pip install --quiet --editable ".[bench]"
	@touch $@

train: $(VENV)/.train
	$(BIN)/python ds_train.py --config examples/quickstart.json

# Not `python -m pytest`: that would find the clone before the wheel.
test: lint wheel
	PYTHONPATH=$(CURDIR)/build/site $(BIN)/pytest -n 2 --dist loadgroup
	PYTHONPATH=$(CURDIR)/build/site TRITON_INTERPRET=1 $(BIN)/pytest -n 2 -m "triton or not gpu" -k triton \
	  tests/test_triton.py tests/test_triton_forms.py tests/test_triton_int8.py tests/test_gradients_after.py \
	  tests/test_shared_memory.py tests/test_bias_correction.py

# What is tested: the package as it is installed, from the sources as they are now.
wheel: $(VENV)/.dev
	@rm -rf build
	$(BIN)/python -m pip install --quiet --no-deps --no-index --no-build-isolation --target build/site .

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)
	$(BIN)/mypy

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

gpu:
	$(PYTHON) tools/gpu.py $(GPU)

# The Python version and the torch of the machine with the GPU (a CUDA build, a few GB once; no GPU is needed here).
CARRY_PYTHON ?= python3.12
CARRY_TORCH  ?= torch==2.11.0
.venv-gpu/.torch:
	$(CARRY_PYTHON) -m venv .venv-gpu
	.venv-gpu/bin/python -m pip install --quiet "$(CARRY_TORCH)" ninja
	@touch $@

gpu-carry: .venv-gpu/.torch
	.venv-gpu/bin/python tools/gpu_carry.py

# Each is timed even where a contender of the other has failed.
RESULTS ?= benchmarks/results
TIMING  := pytest -v -p no:xdist --disable-warnings --benchmark-columns=median,iqr,rounds --benchmark-sort=mean
bench:
	@$(MAKE) --no-print-directory --keep-going --jobs=1 bench-step bench-dtensors bench-forms bench-comm bench-zero bench-scaling bench-quality

bench-step: $(VENV)/.bench
	set=$$($(BIN)/python -c 'import torch; print(torch.backends.cpu.get_cpu_capability().lower())') && \
	$(BIN)/python -m $(TIMING) benchmarks --ignore benchmarks/bench_comm.py --ignore benchmarks/bench_zero.py \
	  --ignore benchmarks/bench_forms.py --ignore benchmarks/bench_step_dtensors.py --ignore benchmarks/bench_scaling.py \
	  --benchmark-json $(RESULTS)/cpu-$$set.json $(BENCH)

bench-dtensors: $(VENV)/.bench
	$(BIN)/python -m $(TIMING) benchmarks/bench_step_dtensors.py --benchmark-json $(RESULTS)/dtensors.json $(BENCH)

bench-forms: $(VENV)/.bench
	$(BIN)/python -m $(TIMING) benchmarks/bench_forms.py --benchmark-json $(RESULTS)/forms.json $(BENCH)

bench-quality: $(VENV)/.bench
	$(BIN)/python benchmarks/quality.py --out $(RESULTS)

bench-comm bench-zero: bench-%: $(VENV)/.bench
	$(BIN)/torchrun --nproc-per-node 2 --local-ranks-filter 0 -m $(TIMING) benchmarks/bench_$*.py \
	  --benchmark-json $(RESULTS)/$*.json $(BENCH)

bench-scaling: $(VENV)/.bench
	$(BIN)/python -m $(TIMING) benchmarks/bench_scaling.py --benchmark-json $(RESULTS)/scaling.json $(BENCH)
	for ranks in 1 2 4; do \
	  $(BIN)/torchrun --nproc-per-node $$ranks --local-ranks-filter 0 -m $(TIMING) benchmarks/bench_zero.py \
	    -k "test_backward and bf16" --elements 16777216 --benchmark-json $(RESULTS)/scaling-$$ranks-ranks.json || exit; \
	done

readme: $(VENV)/.dev
	PYTHONPATH=. $(BIN)/python tools/readme.py
	PYTHONPATH=. $(BIN)/python benchmarks/plot.py $(wildcard $(RESULTS)/cpu-avx512.json $(RESULTS)/cpu-avx2.json) \
	  -o $(RESULTS)/cpu.png
	PYTHONPATH=. $(BIN)/python benchmarks/plot_summary.py $(RESULTS) -o $(RESULTS)/summary.png
	PYTHONPATH=. $(BIN)/python benchmarks/plot_scaling.py $(RESULTS) -o $(RESULTS)/scaling.png

clean:
	rm -rf $(VENV) .venv-gpu .gpu deepfast/prebuilt* build output *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
