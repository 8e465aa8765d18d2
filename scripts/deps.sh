#!/bin/bash
# Installs the Debian packages that building, testing and running need, if any is missing, and those that it is given.
# Asks dpkg first, so a second run is instant and works offline. Says in one line what to do when it cannot help.
set -euo pipefail

fail() {
    printf 'deps: %s\n' "$*" >&2
    exit 1
}

packages=(
    # the guest kernel and what the agent links
    build-essential bc bison flex libelf-dev libssl-dev xz-utils cpio kmod pkg-config libseccomp-dev linux-source-6.12
    # the virtual machine monitor
    qemu-system-x86 qemu-system-common qemu-system-data
    # the image `make run` builds, and looking at the result
    busybox-static iproute2 procps
    # root file systems and volumes on disks, and a quota: the tests' images of them
    e2fsprogs erofs-utils btrfs-progs
    # the pod networks of the tests with a CRI client
    containernetworking-plugins
    # what these and Docker publish ports with
    iptables
)
packages+=("$@")
# the caller, and the runtime that its tests are compared with: from wherever they are, since Debian's would put out Docker's
command -v containerd >/dev/null && command -v ctr >/dev/null || packages+=(containerd)
command -v runc >/dev/null || packages+=(runc)
# what Debian does not have of the tests' clients is built with Go: any will do, as an old one can fetch a newer one
command -v go >/dev/null || [ -x /usr/local/go/bin/go ] || packages+=(golang-go)

command -v dpkg-query >/dev/null ||
    fail "this is not Debian: install the equivalents of these yourself: ${packages[*]}"

# one question for all of them: starting dpkg-query for each would take longer than everything else here
installed=$(dpkg-query -W -f='${binary:Package} ${db:Status-Status}\n' "${packages[@]}" 2>/dev/null || true)
missing=()
for package in "${packages[@]}"; do
    grep -Eq "^${package}(:[a-z0-9]+)? installed$" <<<"$installed" || missing+=("$package")
done
[ "${#missing[@]}" -eq 0 ] && exit 0

sudo=()
if [ "$(id -u)" -ne 0 ]; then
    command -v sudo >/dev/null ||
        fail "packages are missing; as root, run: apt-get install --no-remove --no-install-recommends ${missing[*]}"
    sudo=(sudo)
fi

echo "deps: installing ${missing[*]}"
"${sudo[@]}" apt-get update -q ||
    fail "apt-get update failed: check the network and /etc/apt/sources.list, then run make deps again"
"${sudo[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-remove --no-install-recommends "${missing[@]}" ||
    fail "apt-get install failed (see above; nothing that is installed is removed for it); the packages are in Debian 12, linux-source-6.12 in bookworm-updates or -security"
