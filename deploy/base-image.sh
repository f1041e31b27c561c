#!/usr/bin/env bash
# Makes a base image with Python 3.11 from Debian packages alone, for places where no
# registry can be reached. Prints the image's name, and does nothing where it exists.
#
#     deploy/base-image.sh
#     docker build --build-arg BASE_IMAGE=gmem-base:... ...    (deploy/image.sh does it)
#
# Needs mmdebstrap, docker and a Debian mirror. DEBIAN_SUITE must be one whose python3
# is 3.11, for which the wheels are downloaded.
set -euo pipefail

SUITE=${DEBIAN_SUITE:-bookworm}
# Without a mirror of one's own mmdebstrap takes Debian's, updates and security included.
MIRRORS=()
if [ -n "${DEBIAN_MIRROR:-}" ]; then
    MIRRORS+=("deb $DEBIAN_MIRROR $SUITE main")
fi
if [ -n "${DEBIAN_SECURITY_MIRROR:-}" ]; then
    MIRRORS+=("deb $DEBIAN_SECURITY_MIRROR $SUITE-security main")
fi
# No shell utilities: the image runs Python and nothing else. python3-venv brings the
# wheel of pip; dash is for people who look inside.
PACKAGES=base-files,dash,libstdc++6,media-types,python3,python3-venv,tzdata

# The content of this file decides what the image is.
image=gmem-base:$SUITE-$(sha256sum "${BASH_SOURCE[0]}" | cut -c 1-12)
if docker image inspect "$image" > /dev/null 2>&1; then
    echo "$image"
    exit 0
fi
command -v mmdebstrap > /dev/null || {
    echo "mmdebstrap is missing: 'make tools' as root installs it, or give a base" \
        "image that can be pulled: BASE_IMAGE=python:3.11-slim" >&2
    exit 69
}

# Packages are unpacked, not installed: no maintainer script runs, nothing is configured.
# $1 is the directory, for the hooks' own shell.
# shellcheck disable=SC2016
mmdebstrap --quiet --variant=extract --mode=auto --include="$PACKAGES" \
    --dpkgopt='path-exclude=/usr/share/doc/*' \
    --dpkgopt='path-exclude=/usr/share/man/*' \
    --dpkgopt='path-exclude=/usr/share/info/*' \
    --dpkgopt='path-exclude=/usr/share/locale/*' \
    --dpkgopt='path-exclude=/usr/lib/python3.11/lib2to3/*' \
    --dpkgopt='path-exclude=/usr/lib/python3.11/pydoc_data/*' \
    --customize-hook='echo "root:x:0:0:root:/root:/bin/sh" > "$1/etc/passwd"' \
    --customize-hook='echo "gmem:x:10001:10001:gmem:/:/bin/sh" >> "$1/etc/passwd"' \
    --customize-hook='printf "root:x:0:\ngmem:x:10001:\n" > "$1/etc/group"' \
    --customize-hook='rm -rf "$1"/var/lib/apt/lists/* "$1"/var/cache/apt/*' \
    --customize-hook='rm -rf "$1"/usr/share/doc "$1"/usr/share/man' \
    "$SUITE" - "${MIRRORS[@]}" |
    docker import --change 'ENV LANG=C.UTF-8' --change 'CMD ["python3"]' - "$image" \
    > /dev/null
echo "$image"
