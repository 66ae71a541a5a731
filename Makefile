# The front door. Every target does its own set-up; with nothing missing that costs less than a second.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c

# libnbd's Python binding exists only as a Debian package for Debian's own interpreter.
PYTHON := /usr/bin/python3
VENV := .venv
BIN := $(VENV)/bin
SUDO := $(if $(filter 0,$(shell id -u)),,sudo)
APT := $(SUDO) env DEBIAN_FRONTEND=noninteractive apt-get -o Acquire::Retries=3 -qq
PACKAGES := python3-venv python3-libnbd libnbd-bin qemu-system-x86 qemu-utils nbdkit nbd-client nbd-server \
	fio busybox-static cpio iproute2 e2fsprogs kmod fuse3 openssl gnutls-bin curl strace systemd \
	openssh-client openssh-server sudo git

.PHONY: setup packages demo test test-all check unit lint types bench bench-quick bench-migrate bench-channel fuzz soak chaos docs clean

setup: packages $(VENV)/.installed

# Debian's guest kernel is fetched with `apt-get download`, which needs package lists even when nothing is missing.
packages:
	@missing=$$(for p in $(PACKAGES); do \
	    [ "$$(dpkg-query -W -f '$${Status}' $$p 2>/dev/null)" = "install ok installed" ] || echo $$p; done); \
	if [ -n "$$missing" ] || ! ls /var/lib/apt/lists/*Packages* >/dev/null 2>&1; then \
	    $(APT) update; \
	    [ -z "$$missing" ] || $(APT) install -y --no-install-recommends $$missing >/dev/null; \
	fi

$(VENV)/.installed: pyproject.toml requirements.lock
	@$(MAKE) --no-print-directory packages
	@[ -x $(BIN)/python ] || $(PYTHON) -m venv --system-site-packages $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

demo: setup
	@$(BIN)/nbd-migrate demo

# Tests wait much more than they compute, so twice as many run at a time as there are processors.
JOBS := $(shell echo $$((2 * $$(nproc))))
PARALLEL := -n $(JOBS) --dist worksteal

test: setup
	$(BIN)/pytest $(PARALLEL)

# Every test and cell, of which `make test` runs those that stand for the others.
test-all: setup
	$(BIN)/pytest $(PARALLEL) -m ''

# What needs no QEMU.
check: lint types
	$(BIN)/pytest $(PARALLEL) tests/unit tests/crash tests/fuzz

# The same on another release of Debian, in a chroot; it takes some minutes more when it is made for the first time.
RELEASE_12 := bookworm
RELEASE_13 := trixie
test-debian%:
	@command -v debootstrap >/dev/null || $(APT) install -y --no-install-recommends debootstrap >/dev/null
	$(SUDO) tests/in-debian.sh $(or $(RELEASE_$*),$(error there is no release $*)) make test

unit: setup
	$(BIN)/pytest tests/unit

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/shellcheck $(wildcard recipes/*.sh recipes/channel/*.sh tests/*.sh) .ci/run

types: setup
	$(BIN)/mypy

bench: setup
	$(BIN)/python -m tests.bench
	$(BIN)/python -m tests.bench.overlay

# This version beside AGAINST, a revision or the directory of another checkout; LEAST fails it below a ratio.
AGAINST := HEAD~1
LEAST := 0
bench-quick: setup
	$(BIN)/python -m tests.bench.quick --against $(AGAINST) --least $(LEAST)

# A guest with a disk of SIZE is moved ROUNDS times by each contender, with the disks in each of the DIRECTORIES. It needs root.
SIZE := 4G
DIRECTORIES := /dev/shm /var/tmp
bench-migrate: ROUNDS = 3
bench-migrate: setup
	$(BIN)/python -m tests.bench.migrate --size $(SIZE) --rounds $(ROUNDS) $(addprefix --directory ,$(DIRECTORIES))

# The single channel beside two connections and ssh. As root it has a network of its own.
bench-channel: setup
	$(BIN)/python -m tests.bench.channel

# The fuzzer is installed only here. RUNS counts inputs to each of the four targets.
RUNS := 1000000
fuzz: setup
	@$(BIN)/python -c 'import atheris' 2>/dev/null || \
	    $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-fuzz.lock
	for target in haggle transmit channel greet; do \
	    $(BIN)/python -m tests.fuzz.coverage $$target build/corpus/$$target -runs=$(RUNS) -rss_limit_mb=1024; \
	done

# MILLIONS of requests to one server, whose memory, descriptors and threads must stay as they were.
MILLIONS := 20
soak: setup
	$(BIN)/python -m tests.soak --millions $(MILLIONS)

# ROUNDS migrations, each under a schedule of faults, JOBS at a time; SEED repeats a run. It needs root.
# ENGINE, POLICY, CHANNEL, FORMAT and DISKS (up to three) are drawn for each, unless they are given.
chaos: JOBS = 2
ROUNDS := 50
SEED := $(shell echo $$RANDOM$$RANDOM)
ENGINE := any
POLICY := any
CHANNEL := any
FORMAT := any
DISKS := any
chaos: setup
	$(BIN)/python -m tests.chaos --engine $(ENGINE) --policy $(POLICY) --channel $(CHANNEL) --format $(FORMAT) \
	    --disks $(DISKS) --jobs $(JOBS) $(ROUNDS) $(SEED)

docs: setup
	$(BIN)/python -m tests.support.manual docs/commands.md
	$(BIN)/python -m tests.support.decisions docs/decisions.md
	$(BIN)/python -m tests.support.failures docs/failures.md

clean:
	rm -rf build $(VENV)
