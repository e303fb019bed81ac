# Every target sets itself up in .venv: Python 3.11 to 3.13 and make are enough.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
QUICKSTART := examples/quickstart
SMOLLM2 := examples/smollm2
STUDY := benchmarks/studies/two_patterns

.PHONY: help quickstart smollm2 test test-quick lint evidence clean

help:  ## List the targets
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

$(VENV)/installed: pyproject.toml constraints.txt startup/rpam_mergekit.pth
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[sample,plot,test,lint]'
	touch $@

quickstart: $(VENV)/installed  ## Merge the pair in examples/quickstart and evaluate it
	$(BIN)/mergekit-yaml $(QUICKSTART)/rpam.yml $(QUICKSTART)/out
	$(BIN)/python $(QUICKSTART)/evaluate.py $(QUICKSTART)/out

smollm2: $(VENV)/installed  ## Fetch SmolLM2, merge and evaluate the pair in examples/smollm2
	$(BIN)/python $(SMOLLM2)/base.py
	$(BIN)/mergekit-yaml $(SMOLLM2)/rpam.yml $(SMOLLM2)/out --lora-merge-cache $(SMOLLM2)/experts
	$(BIN)/python $(SMOLLM2)/evaluate.py $(SMOLLM2)/out

test: $(VENV)/installed  ## Run the tests
	$(BIN)/python -m pytest -n 2

test-quick: $(VENV)/installed  ## Run the tests that take under two minutes together
	$(BIN)/python -m pytest -n 2 -m "not slow"

lint: $(VENV)/installed  ## Check style, types, imports and spelling
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/codespell *.md docs examples benchmarks rpam_mergekit startup

evidence: $(VENV)/installed  ## Build the pairs, run the study, write docs/evidence.md
	$(BIN)/python $(STUDY)/study.py $(if $(QUICK),--quick --results build/evidence)
	$(BIN)/python $(STUDY)/evidence.py $(if $(QUICK),--results build/evidence --docs build/evidence)

clean:  ## Remove the environment and the examples' output
	rm -rf $(VENV) $(QUICKSTART)/out
	rm -rf $(addprefix $(SMOLLM2)/,base cache experts out)
