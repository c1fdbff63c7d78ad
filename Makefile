# Every target makes its own environment: `make demo` from a fresh clone is enough.
#   PYTHON=python3.12 make demo     choose the interpreter (3.11 or later)
#   TORCH=torch make .venv          another build of torch than the tested one

.DEFAULT_GOAL := help
.PHONY: help demo test engines check format pocket clean

TORCH ?= torch==2.13.0
BIN := .venv/bin
INSTALLED := .venv/.installed
PIP := $(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check -c constraints.txt
POCKET ?= runs/pocket

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(INSTALLED) ## Decode real text with every built-in drafter, and see what each one gains
	$(BIN)/understudy demo

test: $(INSTALLED) ## Run every test, the slow ones too
	$(BIN)/python -m pytest -n 2 --dist worksteal -m ""

engines: $(INSTALLED) ## Serve built-in drafters and answers in vLLM: same text, as many drafts accepted (once 3 GB)
	$(BIN)/python tests/engines/vllm_drafters.py --reduced 1024
	$(BIN)/python tests/engines/vllm_drafters.py --method dflash
	$(BIN)/python tests/engines/vllm_regenerate.py

check: $(INSTALLED) ## Lint, formatting, types, and who may import whom
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(INSTALLED) ## Mend what lint and formatting can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

pocket: $(INSTALLED) ## Train the deeper built-in model from this interpreter's standard library (hours)
	$(BIN)/understudy data stdlib --output runs/stdlib
	$(BIN)/python recipes/pocket/train.py --corpus runs/stdlib --tokenizer src/understudy/assets/pocket --output $(POCKET)

clean: ## Remove the environment and all caches; runs/ stays
	rm -rf .venv build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis src/*.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch comes first and by its exact version: this finds a CPU build where one is offered, and nothing later replaces it.
# The build backend is installed too, so that building ours needs no second, unpinned environment. --no-compile halves the
# time: Python compiles what is imported when it is imported.
$(INSTALLED): pyproject.toml constraints.txt
	@for python in $(PYTHON) python3.11 python3.12 python3.13 python3; do \
	  if $$python -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	    echo "Making .venv with $$($$python --version) (once; a minute or two)"; \
	    $$python -m venv --clear .venv && exit 0; \
	  fi; \
	done; echo "error: no Python 3.11 or later with venv found; name one: make PYTHON=/path/to/python3.11" >&2; exit 1
	$(PIP) $(TORCH) setuptools
	$(PIP) --no-build-isolation -e '.[dev]'
	@touch $@
