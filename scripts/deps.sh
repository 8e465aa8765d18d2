#!/bin/bash
# Installs the Debian packages that are missing; the second run does nothing.
set -euo pipefail
want="build-essential pkg-config libseccomp-dev qemu-system-x86 containerd runc busybox-static"
missing=""
for p in $want; do dpkg-query -W -f='${Status}' "$p" 2>/dev/null | grep -q 'ok installed' || missing="$missing $p"; done
[ -z "$missing" ] && exit 0
sudo=""; [ "$(id -u)" = 0 ] || sudo=sudo
echo "installing:$missing"
$sudo apt-get update -q && $sudo env DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends $missing
