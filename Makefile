# The way in: `make help`. Debian's packages come from scripts/deps.sh, everything else is xtask (Rust).
PREFIX  ?= /usr/local
DESTDIR ?=
ARGS    ?=
# before anything is built
ifeq ($(filter /%,$(PREFIX)),)
$(error PREFIX="$(PREFIX)" must be an absolute path: leave it out for /usr/local)
endif

export PREFIX DESTDIR

# rustup's default place, for shells that did not read its profile
export PATH := $(PATH):$(HOME)/.cargo/bin
xtask = cargo run --quiet --package xtask --

.DEFAULT_GOAL := help
# the targets share cargo's lock and one terminal: side by side they would only wait for each other
.NOTPARALLEL:
.PHONY: help deps build guest install run test clients nested bench fstest conformance soak check fmt rust

help: ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo 'PREFIX ($(PREFIX)) and DESTDIR are where make install writes. make run ARGS=sh gives a shell in a VM.'

rust:
	@command -v cargo >/dev/null || { echo 'make: cargo is missing: install Rust 1.88 or newer (https://rustup.rs), then run make again' >&2; exit 1; }

deps: ## install the Debian packages that are missing (sudo when you are not root)
	@bash scripts/deps.sh

build: rust deps ## compile the shim, kata-runtime and the agent
	@$(xtask) build

guest: rust deps ## build the guest's kernel (cached), initrd and image into dist/
	@$(xtask) guest

install: build guest ## install into $(DESTDIR)$(PREFIX)
	@$(xtask) install

run: rust deps ## run a container in a VM with a containerd of its own; ARGS is the container's command
	@$(xtask) run -- $(ARGS)

test: rust deps ## run what `make check` runs, the unit tests, then the end-to-end tests in VMs (KVM is not needed)
	@$(xtask) test

clients: rust deps ## run all tests with nerdctl, Docker and kubelet, compared with runc
	@$(xtask) client-tests

nested: rust deps ## run tests in a VM that has emulated KVM and vhost-vsock; ARGS names them, for example "vsock lifecycle"
	@$(xtask) nested -- $(ARGS)

bench: rust ## measure starts, exec, memory, pods, network and file systems, compared with runc, gVisor and bare QEMU
	@bash scripts/deps.sh fio runsc
	@$(xtask) bench

fstest: rust deps ## run the file system test suite pjdfstest with runc, on virtio-fs, on 9p and on a disk, and print the differences
	@$(xtask) fstest

conformance: rust deps ## run Kubernetes' critest with runc and with kata, and print the differences; ARGS is a regular expression of test names
	@$(xtask) conformance -- '$(ARGS)'

soak: rust deps ## create and delete pods for twice five minutes (SECONDS=n) and report what is left behind
	@$(xtask) soak $(SECONDS)

check: rust deps ## check formatting, generated documentation, the shape of the source, and lints
	@$(xtask) check

fmt: rust ## format the sources
	@cargo fmt --all
