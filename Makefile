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

help: ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo 'PREFIX ($(PREFIX)) and DESTDIR say where install writes. make run ARGS="sh" gives a shell in a VM.'

rust:
	@command -v cargo >/dev/null || { echo 'make: cargo is missing: install Rust 1.88 or newer (https://rustup.rs), then run make again' >&2; exit 1; }

deps: ## install the Debian packages that are missing (sudo when you are not root)
	@bash scripts/deps.sh

build: rust deps ## compile the shim, kata-runtime and the static agent
	@$(xtask) build

guest: rust deps ## build the guest's kernel (once, then cached), initrd and image into dist/
	@$(xtask) guest

install: build guest ## install under $(DESTDIR)$(PREFIX)
	@$(xtask) install

run: rust deps ## run a container in a VM through a private containerd; ARGS is its command
	@$(xtask) run -- $(ARGS)

test: rust deps ## formatting, lints, unit tests, then end-to-end tests in VMs (no KVM needed)
	@$(xtask) test

clients: rust deps ## nerdctl, Docker and kubelet, whole: what people run above containerd, beside runc
	@$(xtask) client-tests

nested: rust deps ## tests in a VM that has KVM (emulated) and vhost-vsock; ARGS names them, "vsock lifecycle" for example
	@$(xtask) nested -- $(ARGS)

bench: rust ## measure starts, exec, memory, pods, network, file systems beside runc, gVisor and bare QEMU; a picture of a start
	@bash scripts/deps.sh fio runsc
	@$(xtask) bench

fstest: rust deps ## a file system test suite (pjdfstest) with runc, on virtio-fs, on 9p and on a disk, and the difference
	@$(xtask) fstest

conformance: rust deps ## Kubernetes' critest with runc and with kata, and the difference; ARGS="regular expression" for some
	@$(xtask) conformance -- '$(ARGS)'

soak: rust deps ## pods come and go, twice five minutes (or SECONDS=n), and what is left of them
	@$(xtask) soak $(SECONDS)

check: rust deps ## formatting, generated documentation, the shape of the source and lints only
	@$(xtask) check

fmt: rust ## format the sources
	@cargo fmt --all
