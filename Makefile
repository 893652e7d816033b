# What CI runs is what you type. Needs Python 3.11 or newer, pip and make; everything else goes into .venv.
PYTHON ?= python3
BIN := .venv/bin
CLAIMS ?= pocket-claims
GPU_PYTHON ?= python3.12
GPU_TRITON ?= 3.6.0

.PHONY: help demo test test-gpu test-fla gpu-compile gpu-emulate gpu-bounds gpu-tune gpu-pack gpu-cache check plans tables claims catalogue wheel bench clean

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

.venv/.run: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade -c constraints.txt -e '.[run,eval]'
	touch $@

.venv/.dev: .venv/.run
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

demo: .venv/.run  ## converts the pocket teacher twice and shows both tables
	$(BIN)/recipelin run pocket/lolcats
	$(BIN)/recipelin run pocket/absolute

test: .venv/.dev  ## the whole test suite
	$(BIN)/python -m pytest -n 2

test-gpu: .venv/.dev  ## the Triton kernels on a CUDA device, nothing skipped (JOBS=8: so many compile at once; needs a CUDA build of torch in .venv)
	RECIPELIN_TEST_GPU=1 $(BIN)/python -m pytest -n $(or $(JOBS),4) tests/kernels/test_*_gpu*.py tests/kernels/on_gpu_*.py

# Beside .venv's own packages: where fla is installed, transformers takes its Triton kernels for CPU tensors too.
.venv/fla: .venv/.dev
	$(BIN)/pip install --quiet --no-deps --target $@ 'flash-linear-attention>=0.6,<0.7' 'fla-core>=0.6,<0.7' 'einops>=0.8,<1'

test-fla: .venv/fla  ## fla's gated delta rule (kernel: fla) against the definition, on a CUDA device
	PYTHONPATH=$< RECIPELIN_TEST_GPU=1 $(BIN)/python -m pytest tests/kernels/on_fla_*.py

# The lent machine's Triton beside .venv's own: each makes other pipelines, fences and layouts.
.venv/triton-$(GPU_TRITON): .venv/.dev
	$(BIN)/pip install --quiet --no-deps --target $@ triton==$(GPU_TRITON)

gpu-compile: .venv/triton-$(GPU_TRITON)  ## compiles the Triton kernels for an H100, without one, by two Tritons: registers, spills, shared memory, fences
	PYTHONPATH=.:kernels $(BIN)/python .ci/gpu_compile.py
	PYTHONPATH=$<:.:kernels $(BIN)/python .ci/gpu_compile.py

gpu-emulate: .venv/triton-$(GPU_TRITON)  ## runs the GPU's tests on a CPU, as PTX of an H100 (hours on 2 cores; ONLY="tests/kernels/on_gpu_hybrid.py -k decod")
	PYTHONPATH=$< $(BIN)/python .ci/gpu_emulate.py $(ONLY)

gpu-bounds: .venv/.dev  ## looks at every address of the Triton kernels as a GPU runs them, without one (half an hour on 2 cores)
	PYTHONPATH=.:kernels:.ci $(BIN)/python .ci/gpu_bounds.py

gpu-tune: .venv/.dev  ## times every Triton kernel by blocks, warps and stages on a CUDA device (JOBS=16 processes compile)
	PYTHONPATH=.:kernels $(BIN)/python .ci/gpu_tune.py --jobs $(or $(JOBS),8)

gpu-pack: .venv/.dev  ## packs what a lent GPU's machine lacks for .ci/gpu_session.sh, which runs all that waits for a GPU
	$(BIN)/python .ci/gpu_pack.py

# The lent machine's Python and Triton, with any torch (5 GB: PyPI's brings CUDA).
.venv-gpu/.made: pyproject.toml constraints.txt
	$(GPU_PYTHON) -m venv .venv-gpu
	.venv-gpu/bin/pip install --quiet -c constraints.txt -e '.[run]' pytest pytest-xdist hypothesis
	.venv-gpu/bin/pip install --quiet --no-deps --upgrade --target .venv-gpu/triton triton==$(GPU_TRITON)
	touch $@

gpu-cache: .venv-gpu/.made  ## compiles for a lent GPU what its tests, bars and sweeps launch (GPU_PYTHON=python3.12; half an hour on 2 cores)
	PYTHONPATH=.venv-gpu/triton:.:kernels .venv-gpu/bin/python .ci/gpu_cache.py

check: .venv/.dev  ## style, types, every recipe, suite, table and claims spec, and the catalogue
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/recipelin check recipes results/tables
	$(BIN)/recipelin list --check recipes/README.md

plans: .venv/.run  ## the plan of every recipe
	for recipe in $$(find recipes -name '*.yaml' -not -path 'recipes/suites/*' | sort); do \
	  $(BIN)/recipelin plan $$recipe --device cpu || exit 1; echo; done

tables: .venv/.run  ## makes every table anew from results/records and compares it with the committed one
	$(BIN)/recipelin table results/tables --check

claims: .venv/.run  ## runs every recipe of results/tables/pocket-claims.yaml that has no Record yet; CLAIMS=pocket-taylor-claims, JOBS=1; AGAIN=1: those that have one too
	$(BIN)/python .ci/claims.py $(CLAIMS:%=results/tables/%.yaml) $(if $(JOBS),--jobs $(JOBS)) $(if $(AGAIN),--again)

catalogue: .venv/.run  ## makes recipes/README.md anew
	$(BIN)/recipelin list --format markdown > recipes/README.new
	mv recipes/README.new recipes/README.md

wheel:  ## builds the wheel, installs it in an empty environment and runs a recipe from another folder (four minutes)
	$(PYTHON) .ci/wheel.py

bench: .venv/.dev  ## measures every bar of speed and memory into kernels/bench/record.md
	$(BIN)/recipelin bench --write

clean:  ## removes .venv, dist and runs
	rm -rf .venv dist runs
