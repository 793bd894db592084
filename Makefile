# Everything a developer or CI runs. `make` alone says what there is.
# Works as root on a fresh Debian or Ubuntu with nothing but this checkout; installs what it needs, and says so.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RESULTS := $(or $(LAB_RESULTS),$(or $(CSI_VDUSE_CACHE),.cache)/results)
STAMP := $(VENV)/.installed
ENGINE := $(wildcard csi_vduse/dataplane/src/*.[ch] csi_vduse/dataplane/src/backends/*.c csi_vduse/dataplane/src/backends/*/*.[ch] csi_vduse/dataplane/decl/*.h)
SHELL := /bin/sh
PYTEST = $(BIN)/python -m pytest -q --junitxml=$(RESULTS)/$@.xml
# Where the suites for a VDUSE kernel run: user-mode Linux, quick; or LAB=qemu, host. Emulated: what the other cannot test.
LAB ?= uml
IN_LAB = LAB=$(LAB) $(BIN)/python -m lab run --timeout 3600 -- $(PYTEST) -p no:cacheprovider
IN_EMULATED = LAB=qemu $(BIN)/python -m lab run --timeout 7200 -- $(PYTEST) -p no:cacheprovider
TIMED = start=$$(date +%s); $(1); status=$$?; echo "make: $@ took $$(($$(date +%s) - start)) s"; exit $$status

.DEFAULT_GOAL := help
.PHONY: help deps install lab-deps demo test test-unit test-ring fuzz-deps test-fuzz fuzz test-vhost-user test-deps lab-build test-lab test-vm test-power-cut test-emulated test-kernels test-chaos chaos chaos-power-cuts chaos-deaths test-helm test-sanity cluster-deps cluster-build cluster-up cluster-down demo-kubernetes test-e2e test-cluster test-suite dashboard bench-deps bench bench-pauses bench-quick bench-publish verify clean

help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

deps:
	@tools/install-deps.sh

$(STAMP): pyproject.toml setup.py csi_vduse/dataplane/_build.py csi_vduse/dataplane/_system_build.py $(ENGINE)
	@tools/install-deps.sh
	@echo "make: installing csi-vduse and its Python packages into $(VENV)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

install: $(STAMP) ## a working csi-vduse in .venv/bin, build dependencies included

lab-deps: install
	@lab/install-deps.sh
	@$(BIN)/python -m lab prepare

demo: lab-deps ## the main job on a real VDUSE kernel: in user-mode Linux if it has been built, else in a VM
	@$(call TIMED,LAB=any $(BIN)/python -m lab run --timeout 900 -- $(BIN)/python -m lab.demo)

test: install ## all tests: native ones, the engine under sanitizers, the lab, the VM suite, chaos, a cluster
	@$(BIN)/python tools/run_tests.py --results $(RESULTS)

test-deps: fuzz-deps
	@lab/install-deps.sh
	@lab/install-cluster-deps.sh

lab-build: install
	@nice $(BIN)/python -m lab prepare --all

test-unit: install ## unit tests: seconds, no kernel
	@$(call TIMED,$(PYTEST) tests/unit)

test-helm: install ## the Helm chart: lint, schema, renders, rights; builds Helm once
	@tools/build_helm.sh >/dev/null
	@$(call TIMED,$(PYTEST) tests/helm)

test-sanity: install ## csi-sanity natively: standalone, and controller and node plugin over custom resources
	@tools/build_csi_sanity.sh >/dev/null
	@$(call TIMED,$(PYTEST) tests/sanity)

test-ring: install ## the C engine against a driver of the tests, under ASan, UBSan and TSan
	@$(call TIMED,$(PYTEST) tests/ring)

fuzz-deps: install
	@tools/install-fuzz-deps.sh

test-fuzz: fuzz-deps ## the fuzzers on their corpus, and a little beyond: a minute
	@$(call TIMED,tests/fuzz/run.sh 12)

FUZZ_SECONDS ?= 1200
fuzz: fuzz-deps ## the fuzzers for long: FUZZ_SECONDS each (1200), FUZZERS="split packed log threads nbd session decode"
	@$(call TIMED,tests/fuzz/run.sh $(FUZZ_SECONDS) $(FUZZERS))

test-vhost-user: lab-deps ## the vhost-user server against libblkio and QEMU guests; no VM of the lab, no root
	@$(BIN)/python -m lab.vhost_client
	@$(call TIMED,$(PYTEST) tests/vhost_user)

test-lab: lab-deps ## the lab itself: exit codes, timeouts, a kernel panic
	@$(call TIMED,$(PYTEST) tests/lab)

test-vm: lab-deps ## what touches the kernel, in one boot; csi-sanity and remote volumes among it
	@tools/build_csi_sanity.sh
	@$(call TIMED,$(IN_LAB) tests/vm --lane=native)

chaos-tools: lab-deps
	@$(MAKE) --no-print-directory --silent -C tests/chaos

test-chaos: chaos-tools ## everything that can die or hang does, under verified I/O, a few times
	@$(call TIMED,$(IN_LAB) tests/chaos/vm --lane=native)

test-power-cut: chaos-tools ## the machine loses power while it writes: what was flushed is there, in order
	@$(call TIMED,$(PYTEST) tests/chaos/host)

test-emulated: chaos-tools ## on Debian's kernel, emulated: what needs several processors, or that kernel
	@$(call TIMED,$(IN_EMULATED) tests/vm tests/chaos/vm --lane=emulated)

test-kernels: chaos-tools ## all that touches the kernel on each: Debian's 6.12 and newest, user-mode Linux; hours
	@tools/build_csi_sanity.sh
	@$(call TIMED,for kernel in 6.12 sid; do LAB_KERNEL=$$kernel $(IN_EMULATED) tests/vm tests/chaos/vm || exit; done; \
		LAB=uml $(BIN)/python -m lab run --timeout 3600 -- $(PYTEST) -p no:cacheprovider tests/vm tests/chaos/vm)

CHAOS_SEED ?= $(shell od -An -N3 -tu4 /dev/urandom | tr -d ' ')
chaos: chaos-tools ## the same hundreds of times: an hour and more; CHAOS_SEED=N repeats the choices of an earlier run
	@$(call TIMED,$(MAKE) --no-print-directory -j2 chaos-power-cuts chaos-deaths CHAOS_SEED=$(CHAOS_SEED))

LONG = --chaos=long --chaos-seed=$(CHAOS_SEED)
chaos-power-cuts:
	@$(PYTEST) tests/chaos/host $(LONG)

chaos-deaths:
	@LAB=$(LAB) $(BIN)/python -m lab run --timeout 28800 -- $(PYTEST) -p no:cacheprovider tests/chaos/vm $(LONG)

cluster-build cluster-up demo-kubernetes test-e2e test-cluster test-suite dashboard: export LAB := $(LAB)

cluster-deps: lab-deps
	@lab/install-cluster-deps.sh

cluster-build: cluster-deps ## what the cluster lab is made of, into the cache: Kubernetes from source, images
	@$(call TIMED,$(BIN)/python -m lab.cluster build)

cluster-up: cluster-deps ## a Kubernetes cluster of two machines with VDUSE kernels; kubectl: python -m lab.cluster kubectl
	@$(call TIMED,$(BIN)/python -m lab.cluster up)

cluster-down: install ## end the cluster
	@$(BIN)/python -m lab.cluster down

STORY ?= life
demo-kubernetes: cluster-deps ## a volume's life on the cluster, started if need be; or STORY=faults, upgrade, moving
	@$(call TIMED,$(BIN)/python -m lab.demo_kubernetes $(STORY))

test-e2e: cluster-deps ## the steps of all stories with assertions, on the cluster, started if need be
	@$(call TIMED,$(PYTEST) tests/e2e)

test-cluster: cluster-deps ## a volume's life, and one of a vhost-user server, with assertions; the cluster is started, and ended
	@$(call TIMED,$(PYTEST) tests/e2e -k 'life or served'; \
		passed=$$?; $(BIN)/python -m lab.cluster down; test $$passed = 0)

FOCUS ?=
test-suite: cluster-deps ## Kubernetes' own storage tests on the cluster, started if need be: hours; FOCUS=REGEX for some
	@$(call TIMED,$(BIN)/python -m lab.storage_suite --focus '$(FOCUS)')

dashboard: cluster-deps ## a picture for the docs: the Grafana dashboard of the cluster, started if need be; needs Node.js 20
	@lab/install-cluster-deps.sh prometheus chromium
	@$(call TIMED,$(BIN)/python -m lab.dashboard)

bench-deps: lab-deps
	@tools/install-bench-deps.sh

bench: bench-deps ## everything measured against the peers, on an otherwise quiet machine: an hour
	@$(call TIMED,$(BIN)/python -m bench)

bench-pauses: bench-deps ## pauses in the VM over 100 events of each kind, which `make bench` takes 10 of: hours
	@$(call TIMED,$(BIN)/python -m bench pause --events 100)

bench-quick: bench-deps ## proves that all of the benchmarks run; their figures are void
	@$(call TIMED,$(BIN)/python -m bench --quick)

bench-publish: install ## the figures of the last `make bench` into docs/
	@$(BIN)/python -m bench report --publish

verify: install ## generated files, ruff, mypy, import contracts; the engine's format, and which of its files calls which
	@$(BIN)/python tools/generate_proto.py --check
	@PYTHONPATH=. $(BIN)/python tools/check_csi_proto.py
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --check --quiet .
	@$(BIN)/mypy
	@$(BIN)/lint-imports
	@$(BIN)/clang-format --dry-run -Werror $(ENGINE)
	@PYTHONPATH=. $(BIN)/python tools/check_engine_calls.py

clean: ## remove the virtual environment and what was built; the cache stays
	rm -rf $(VENV) build *.egg-info csi_vduse/dataplane/_engine.c csi_vduse/dataplane/_system.c csi_vduse/dataplane/*.so
	$(MAKE) -C tests/ring clean
