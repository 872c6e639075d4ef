# demo, test, test-newest, test-lmms, test-gpu, lint, bench. Every target installs what it needs into .venv.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
IMAGE ?= docs/scene.png
QUESTION ?= What stands directly right of the shape directly above the egg?

demo: $(VENV)/demo.done
	$(BIN)/vlmamba ask $(IMAGE) "$(QUESTION)"

test: $(VENV)/dev.done
	$(BIN)/python -m pytest -q

# The models, the processor and the command line once more, against the newest transformers 5.
test-newest: $(VENV)/dev.done
	$(BIN)/pip install -q --no-deps --upgrade --target $(VENV)/newest "transformers<6"
	PYTHONPATH=$(VENV)/newest $(BIN)/python -m pytest -q tests/models tests/test_cli.py

# The plugin against lmms-eval's own registry and types, without its forty dependencies.
test-lmms: $(VENV)/dev.done
	$(BIN)/pip install -q --upgrade --target $(VENV)/lmms loguru pydantic pytz
	$(BIN)/pip install -q --upgrade --no-deps --target $(VENV)/lmms lmms_eval==0.7.3
	PYTHONPATH=$(VENV)/lmms $(BIN)/python -m pytest -q tests/commands/test_lmms.py

test-gpu: $(VENV)/dev.done
	$(BIN)/python -m pytest -q -m gpu && $(BIN)/python -m pytest -q tests/ops

lint: $(VENV)/dev.done
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

bench: $(VENV)/dev.done
	$(BIN)/python -m benchmarks

# torch first and by itself, so that a CPU build at hand is taken where there is one.
$(VENV)/demo.done: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt torch
	$(BIN)/pip install -q -c constraints.txt -e .
	touch $@

$(VENV)/dev.done: $(VENV)/demo.done
	$(BIN)/pip install -q -c constraints.txt -e ".[dev,train,lora,parquet,eval]"
	touch $@

.PHONY: demo test test-newest test-lmms test-gpu lint bench
