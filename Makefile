# Everything a developer or CI runs. `make` alone says what there is.
# Works as root on a fresh Debian or Ubuntu with nothing but this checkout; installs what it needs, and says so.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RESULTS := $(or $(LAB_RESULTS),$(or $(CSI_VDUSE_CACHE),.cache)/results)
STAMP := $(VENV)/.installed
ENGINE := $(wildcard csi_vduse/dataplane/src/*.[ch] csi_vduse/dataplane/src/backends/*.c csi_vduse/dataplane/src/backends/*/*.[ch] csi_vduse/dataplane/decl/*.h)
SHELL := /bin/sh
IN_VM := $(BIN)/python -m lab run --timeout 3600 -- $(BIN)/python -m pytest -q -p no:cacheprovider
TIMED = start=$$(date +%s); $(1); status=$$?; echo "make: $@ took $$(($$(date +%s) - start)) s"; exit $$status

.DEFAULT_GOAL := help
.PHONY: help deps install lab-deps demo test test-unit test-ring fuzz-deps test-fuzz fuzz test-vhost-user test-lab test-vm test-power-cut test-chaos chaos test-helm test-sanity cluster-deps cluster-build cluster-up cluster-down demo-kubernetes test-e2e test-cluster test-suite dashboard bench-deps bench bench-pauses bench-quick bench-publish verify clean

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

demo: lab-deps ## the main job on a real VDUSE kernel, in a VM: minutes
	@$(call TIMED,$(BIN)/python -m lab run --timeout 900 -- $(BIN)/python -m lab.demo)

test: ## all tests: native ones, the engine under sanitizers, the lab, the VM suite, chaos, a cluster
	@$(call TIMED,$(MAKE) --no-print-directory test-unit && $(MAKE) --no-print-directory test-helm && \
		$(MAKE) --no-print-directory test-sanity && \
		$(MAKE) --no-print-directory test-ring && \
		$(MAKE) --no-print-directory test-fuzz && \
		$(MAKE) --no-print-directory test-vhost-user && $(MAKE) --no-print-directory test-lab && $(MAKE) --no-print-directory test-vm && \
		$(MAKE) --no-print-directory test-chaos && $(MAKE) --no-print-directory test-cluster)

test-unit: install ## unit tests: seconds, no kernel
	@$(call TIMED,$(BIN)/python -m pytest -q tests/unit)

test-helm: install ## the Helm chart: lint, schema, renders, rights; builds Helm once
	@tools/build_helm.sh >/dev/null
	@$(call TIMED,$(BIN)/python -m pytest -q tests/helm)

test-sanity: install ## csi-sanity natively: standalone, and controller and node plugin over custom resources
	@tools/build_csi_sanity.sh >/dev/null
	@$(call TIMED,$(BIN)/python -m pytest -q tests/sanity)

test-ring: install ## the C engine against a driver of the tests, under ASan, UBSan and TSan
	@$(call TIMED,$(BIN)/python -m pytest -q tests/ring)

fuzz-deps: install
	@tools/install-fuzz-deps.sh

test-fuzz: fuzz-deps ## the fuzzers on their corpus, and a little beyond: a minute
	@$(call TIMED,tests/fuzz/run.sh 12)

FUZZ_SECONDS ?= 1200
fuzz: fuzz-deps ## the fuzzers for long: FUZZ_SECONDS each (1200), FUZZERS="split packed log threads nbd session decode"
	@$(call TIMED,tests/fuzz/run.sh $(FUZZ_SECONDS) $(FUZZERS))

test-vhost-user: lab-deps ## the vhost-user server against libblkio and QEMU guests; no VM of the lab, no root
	@$(BIN)/python -m lab.vhost_client
	@$(call TIMED,$(BIN)/python -m pytest -q tests/vhost_user)

test-lab: lab-deps ## the lab itself: exit codes, timeouts, a kernel panic
	@$(call TIMED,$(BIN)/python -m pytest -q tests/lab)

test-vm: lab-deps ## what touches the kernel, in one boot of the VM; csi-sanity and remote volumes among it
	@tools/build_csi_sanity.sh
	@$(call TIMED,$(IN_VM) tests/vm --junitxml=$(RESULTS)/vm.xml)

chaos-tools: lab-deps
	@$(MAKE) --no-print-directory --silent -C tests/chaos

test-power-cut: chaos-tools ## the machine loses power while it writes: what was flushed is there, in order
	@$(call TIMED,$(BIN)/python -m pytest -q tests/chaos/host)

test-chaos: test-power-cut ## everything that can die or hang does, under verified I/O, a few times
	@$(call TIMED,$(IN_VM) tests/chaos/vm --junitxml=$(RESULTS)/chaos.xml)

CHAOS_SEED ?= $(shell od -An -N3 -tu4 /dev/urandom | tr -d ' ')
chaos: chaos-tools ## the same hundreds of times: hours; CHAOS_SEED=N repeats the choices of an earlier run
	@$(call TIMED,$(BIN)/python -m pytest -q tests/chaos/host --chaos=long --chaos-seed=$(CHAOS_SEED) && \
		$(BIN)/python -m lab run --timeout 28800 -- $(BIN)/python -m pytest -q -p no:cacheprovider \
			tests/chaos/vm --chaos=long --chaos-seed=$(CHAOS_SEED) --junitxml=$(RESULTS)/chaos-long.xml)

cluster-deps: lab-deps
	@lab/install-cluster-deps.sh

cluster-build: cluster-deps ## what the cluster lab is made of, into the cache: Kubernetes from source, images
	@$(call TIMED,$(BIN)/python -m lab.cluster build)

cluster-up: cluster-deps ## a Kubernetes cluster of two VMs with VDUSE kernels; kubectl: python -m lab.cluster kubectl
	@$(call TIMED,$(BIN)/python -m lab.cluster up)

cluster-down: install ## end the cluster
	@$(BIN)/python -m lab.cluster down

STORY ?= life
demo-kubernetes: cluster-deps ## a volume's life on the cluster, started if need be; or STORY=faults, upgrade, moving
	@$(call TIMED,$(BIN)/python -m lab.demo_kubernetes $(STORY))

test-e2e: cluster-deps ## the steps of all stories with assertions, on the cluster, started if need be
	@$(call TIMED,$(BIN)/python -m pytest -q tests/e2e --junitxml=$(RESULTS)/e2e.xml)

test-cluster: cluster-deps ## a volume's life with assertions, on a cluster that is started, and ended: 15 minutes
	@$(call TIMED,$(BIN)/python -m pytest -q tests/e2e -k life --junitxml=$(RESULTS)/cluster.xml; \
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

verify: install ## generated files, ruff, mypy, import contracts
	@$(BIN)/python tools/generate_proto.py --check
	@PYTHONPATH=. $(BIN)/python tools/check_csi_proto.py
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --check --quiet .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

clean: ## remove the virtual environment and what was built; the cache stays
	rm -rf $(VENV) build *.egg-info csi_vduse/dataplane/_engine.c csi_vduse/dataplane/_system.c csi_vduse/dataplane/*.so
	$(MAKE) -C tests/ring clean
