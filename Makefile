# Everything runs in .venv, which the first target that needs it creates. `make help` lists the targets.
PYTHON ?= python3
DATA ?= digits
DATA_ROOT ?=
ARGS ?=
WHEEL_TORCH ?= 2.13.0

VENV_PYTHON := .venv/bin/python
BUILD_INPUTS := pyproject.toml setup.py $(shell find csrc -type f)
SOURCES := bench csrc dendrite_kernels tests docs $(wildcard *.md) CITATION.cff LICENSE Makefile MANIFEST.in pyproject.toml setup.py constraints.txt .clang-format
CXX_SOURCES := $(shell find csrc bench tests -name '*.h' -o -name '*.cpp' -o -name '*.inl' -o -name '*.cu' -o -name '*.cuh')

QUICK := -m 'not slow and not tools'

.PHONY: help demo paper paper-full test test-all test-tools test-numba test-numba-oldest test-neon test-sanitize coverage wheel lint docs bench benchmark benchmark-compare gpu clean

help:
	@echo 'make demo [DATA=digits|mnist|fmnist|cifar10|...] [DATA_ROOT=folder]'
	@echo '                  train a dANN and its masked-dense twin, write reports/demo.json and .png'
	@echo 'make paper [DATA=digits|mnist|...] [DATA_ROOT=folder]'
	@echo '                  train small networks of the article in minutes, write reports/DATA/report.html'
	@echo 'make paper-full DATA=fmnist DATA_ROOT=folder'
	@echo '                  the article on one data set: hours; start it again after a stop'
	@echo 'make test         run the tests; make test-all: the slow ones too'
	@echo 'make test-tools   the layers in Lightning, accelerate, transformers, skorch, tensorboard: installs them'
	@echo 'make test-neon    compile the CPU kernels for ARM, check them in an emulator (g++-aarch64-linux-gnu, qemu-user)'
	@echo 'make test-sanitize  check the CPU kernels of this machine with the sanitizers for addresses, undefined behaviour and threads'
	@echo 'make coverage     count the lines that tests run, in Python and in csrc/cpu: reports/coverage/index.html (g++, gcov)'
	@echo 'make test-numba   install without a compiler in .venv-numba and run the tests on Numba alone'
	@echo 'make test-numba-oldest  the tests of the Numba backend on the oldest Numba that pyproject.toml allows'
	@echo 'make wheel [WHEEL_TORCH="2.11.0 2.13.0"]'
	@echo '                  build the wheel, check it, train a step with it beside each of these torch versions'
	@echo 'make lint         ruff, mypy, clang-format, codespell'
	@echo 'make docs         build the documentation site in reports/docs/html; a warning is an error'
	@echo 'make bench        time the layer against everything else one could use, write reports/bench.html: speed, memory,'
	@echo '                  rooflines, where dense wins, the overhead of a call. ARGS goes to bench.speed.run, which without'
	@echo '                  make writes to bench/results: python -m bench.speed.run --cases A --name cpu'
	@echo 'make benchmark    time our kernels and steps by pytest-benchmark, write reports/benchmark.json'
	@echo 'make benchmark-compare BASE=REF'
	@echo '                  build the commit REF beside the working tree, time both in turns, fail if we became slower'
	@echo 'make gpu          on a machine with an NVIDIA GPU: build, test, sanitize and time the CUDA backend, write'
	@echo '                  reports/gpu; ARGS=--dry-run: the same without one, with a stub in its place'
	@echo 'make clean        remove .venv*, built files and caches'
	@echo 'PYTHON=python3.x chooses the interpreter, ARGS=... is passed on to the command'

demo: .venv/.installed-demo
	$(VENV_PYTHON) -m bench.paper.demo --data '$(DATA)' --data-root '$(DATA_ROOT)' $(ARGS)

PAPER := $(VENV_PYTHON) -m bench.paper
REPORT := reports/$(DATA)
ROOT := $(if $(DATA_ROOT),--data-root '$(DATA_ROOT)')

paper: .venv/.installed-demo
	$(PAPER) sweep quick --data '$(DATA)' $(ROOT) --trials 2 --table '$(REPORT)/quick.db' $(ARGS)
	$(PAPER) analyse '$(REPORT)/quick.db' --embed $(ROOT) --output '$(REPORT)'
	$(PAPER) report '$(REPORT)/quick.db' --output '$(REPORT)'

paper-full: .venv/.installed-demo
	$(PAPER) sweep fixed table1 dendritic noise sequential depth dropout learning-rate early-stopping branching \
	  --data '$(DATA)' $(ROOT) --table '$(REPORT)/full.db' $(ARGS)
	$(PAPER) analyse '$(REPORT)/full.db' --embed $(ROOT) --output '$(REPORT)'
	$(PAPER) report '$(REPORT)/full.db' --output '$(REPORT)'

test: .venv/.installed-test
	$(VENV_PYTHON) -m pytest -q $(QUICK) $(ARGS)

test-tools: .venv/.installed-tools
	$(VENV_PYTHON) -m pytest -q -m tools $(ARGS)

test-all: .venv/.installed-tools
	$(VENV_PYTHON) -m pytest -q $(ARGS)

test-neon: .venv/.installed-test
	$(VENV_PYTHON) -m tests.cpu_kernels.build neon

test-sanitize: .venv/.installed-test
	$(VENV_PYTHON) -m tests.cpu_kernels.build sanitize
	$(VENV_PYTHON) -m tests.cpu_kernels.build threads

coverage: .venv/.installed-coverage
	$(VENV_PYTHON) -m tests.coverage $(ARGS)

# What a user without a compiler gets: a plain install of a copy that holds nothing built before, and
# the tests on what was installed, with links to all programs on PATH but compilers.
COPY := build/numba
NO_COMPILER := DENDRITE_KERNELS_CUDA=0 DENDRITE_KERNELS_REQUIRE= PATH='$(CURDIR)/$(COPY)/programs'
NUMBA_PYTHON := cd $(COPY) && env -u CC -u CXX $(NO_COMPILER) '$(CURDIR)/.venv-numba/bin/python'

test-numba:
	@test -x .venv-numba/bin/python || $(PYTHON) -m venv .venv-numba
	rm -rf $(COPY) && mkdir -p $(COPY)/programs
	@for file in $$(echo "$$PATH" | tr ':' '\n' | sed 's,$$,/*,'); do case $${file##*/} in \
	  *g++*|*gcc*|c++*|*-c++|cc|*-cc|c89*|c99*|*clang*|icx|icpx|nvcc*) ;; \
	  *) test -e "$(COPY)/programs/$${file##*/}" || ln -s "$$file" $(COPY)/programs/ ;; esac; done
	tar -cf - --exclude='*.so' --exclude='*.pyd' --exclude=__pycache__ $(SOURCES) | tar -xf - -C $(COPY)
	CC=false CXX=false $(NO_COMPILER) .venv-numba/bin/python -m pip install -c constraints.txt './$(COPY)[test]'
	rm -r $(COPY)/dendrite_kernels
	$(NUMBA_PYTHON) -c 'import dendrite_kernels as dk; dk.use_backend("numba"); \
	  reason = dk.backend_info()["cpp"]["reason"]; print("cpp:", reason); \
	  assert reason and "compiler" in reason, reason'
	$(NUMBA_PYTHON) -m pytest -q $(QUICK) $(ARGS)

# `make test` runs on the newest one that pyproject.toml allows, which constraints.txt pins.
OLDEST := 'numba==0.61.*' 'numpy<2.3' $(shell sed -nE 's/^((torch|pytest)==[^;]*).*/\1/p' constraints.txt) scipy safetensors

test-numba-oldest:
	@test -x .venv-numba-oldest/bin/python || $(PYTHON) -m venv .venv-numba-oldest
	.venv-numba-oldest/bin/python -m pip install $(OLDEST)
	.venv-numba-oldest/bin/python -m pytest -q tests/backends/test_numba_backend.py \
	  tests/backends/test_numba_processes.py $(ARGS)

# pip chooses which build of torch it is: set PIP_EXTRA_INDEX_URL where PyPI has only the one for CUDA.
wheel: .venv/.installed-wheel
	$(VENV_PYTHON) -m tests.package.wheel $(WHEEL_TORCH)

lint: .venv/.installed-lint
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/clang-format --dry-run -Werror $(CXX_SOURCES)
	.venv/bin/codespell . .github

docs: .venv/.installed-docs
	$(VENV_PYTHON) -m sphinx -W --keep-going -d reports/docs/doctrees docs reports/docs/html $(ARGS)

# Some 10 to 15 minutes on two quiet cores.
bench: .venv/.installed-demo
	$(VENV_PYTHON) -m bench.speed.run --output reports/bench/cpu.json $(or $(ARGS),--cases A B C E --seconds 2 --memory)
	$(VENV_PYTHON) -m bench.questions.crossover --output reports/bench/crossover.json --inputs 784 --seconds 1
	$(VENV_PYTHON) -m bench.questions.overhead --output reports/bench/overhead.json
	$(VENV_PYTHON) -m bench.speed.report

benchmark: .venv/.installed-test
	mkdir -p reports
	$(VENV_PYTHON) -m pytest bench/test_speed.py --benchmark-sort=name --benchmark-columns=min,median,iqr,rounds \
	  --benchmark-json=reports/benchmark.json $(ARGS)

benchmark-compare: .venv/.installed-test
	$(VENV_PYTHON) -m bench.speed.compare '$(BASE)' $(ARGS)

# Uses the Python that has a CUDA build of torch, not .venv, whose torch is pinned for CPUs.
gpu:
	$(PYTHON) -m bench.gpu $(ARGS)

clean:
	rm -rf .venv .venv-numba .venv-numba-oldest build *.egg-info .mypy_cache .pytest_cache .ruff_cache .benchmarks
	find dendrite_kernels bench tests -name __pycache__ -exec rm -rf {} +
	find dendrite_kernels -name '*.so' -delete

# One build serves every target: the editable install is repeated when what pip builds has changed.
.venv/.built: $(VENV_PYTHON) $(BUILD_INPUTS)
	@$(VENV_PYTHON) -m pip install -c constraints.txt -e . || \
	  { echo 'pip could not install the package: its last lines say what is missing' \
	         '(a package index it can reach? a C++ compiler, if DENDRITE_KERNELS_REQUIRE asks for one?)' >&2; exit 1; }
	@touch $@

# % is an extra. By its name pip finds the package installed and adds what the extra needs.
.venv/.installed-%: .venv/.built constraints.txt
	@$(VENV_PYTHON) -m pip install -c constraints.txt 'dendrite-kernels[$*]' || \
	  { echo 'pip could not install what the extra [$*] needs: its last lines say why' >&2; exit 1; }
	@touch $@

$(VENV_PYTHON):
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("Expected Python 3.10 or newer, got " + sys.version)'
	@$(PYTHON) -m venv .venv || \
	  { rm -rf .venv; echo '"$(PYTHON) -m venv .venv" failed. On Debian and Ubuntu: apt install python3-venv' >&2; exit 1; }
