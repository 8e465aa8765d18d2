export LIBSECCOMP_LINK_TYPE ?= static
export LIBSECCOMP_LIB_PATH ?= /usr/lib/x86_64-linux-gnu

.PHONY: help deps build test
help: ## this list
	@grep -E '^[a-z]+:.*##' Makefile | sed 's/:.*##/\t/'
deps: ## Debian packages
	@bash scripts/deps.sh
build: deps ## shim and agent
	cargo build --release -p shim
	RUSTFLAGS="-C target-feature=+crt-static" cargo build --release --target x86_64-unknown-linux-gnu -p agent
test: deps ## unit tests
	cargo test --workspace
