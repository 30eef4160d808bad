# make demo    train on the sample, export, explain
# make test    the tests
# make lint    ruff and mypy
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO := output/demo

.PHONY: demo test lint
demo: $(VENV)/.demo
	rm -rf $(DEMO)
	$(BIN)/python train/train.py -c train/recipes/sample/rn26_tm.yaml --output output --experiment demo
	$(BIN)/python -m export onnx rn26_tm --checkpoint $(DEMO)/best.safetensors --patch-logits --output $(DEMO)/rn26_tm.onnx
	$(BIN)/python -m timm_tmblock explain $(DEMO)/rn26_tm.onnx train/sample/images/*.png --output $(DEMO)/explained
	@echo
	@echo "Weights              $(DEMO)/best.safetensors"
	@echo "ONNX, patch logits   $(DEMO)/rn26_tm.onnx"
	@echo "Explanations         $(DEMO)/explained/*.png"
	@echo "Record               $(DEMO)/summary.csv, tensorboard --logdir $(DEMO)"

test: $(VENV)/.installed $(VENV)/triton $(VENV)/space
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

lint: $(VENV)/.installed
	$(BIN)/ruff check
	$(BIN)/mypy

$(VENV)/.demo: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "timm-tmblock needs Python 3.10 or newer")'
	$(BIN)/python -m pip --version > /dev/null 2>&1 || $(BIN)/python -m ensurepip > /dev/null 2>&1 \
		|| $(PYTHON) -m venv --clear $(VENV)  # environments of uv have no pip
	$(BIN)/python -m pip install --quiet --editable ".[train,export,ort]"
	touch $@

$(VENV)/.installed: $(VENV)/.demo
	$(BIN)/python -m pip install --quiet --editable ".[train,analysis,export,ort,hub,dev]"
	touch $@

# the real Triton server, which judges model repositories in the tests; its Python packages are not wanted
$(VENV)/triton: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --no-deps --no-compile --target $@ nvidia-pytriton==0.7.0 && touch $@ \
		|| { rm -rf $@; echo "no Triton server to test with"; }

# what the Hub installs for the Space, and nothing else
$(VENV)/space: hub_cards/space/README.md hub_cards/space/requirements.txt | $(VENV)/.installed
	$(PYTHON) -m venv $@
	$@/bin/pip install --quiet gradio==$$(sed -n 's/^sdk_version: //p' $<) -r hub_cards/space/requirements.txt \
		&& touch $@ || { rm -rf $@; echo "no gradio to test the Space with"; }
