#!/usr/bin/env bash
# Builds the image, named after its content; prints the name. Does nothing where it
# exists. It is tagged gmem:latest as well, which compose.yaml takes by default.
#
#     deploy/image.sh
#     BASE_IMAGE=python:3.11-slim deploy/image.sh     on top of an image from a registry
#
# Without BASE_IMAGE: Debian packages (base-image.sh) where mmdebstrap is installed,
# else the Dockerfile's default. PYTHON must have pip and hatchling (make setup).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PYTHON=${PYTHON:-.venv/bin/python}
CONTEXT=build/image

say() { echo "image: $*" >&2; }

if [ -z "${BASE_IMAGE:-}" ]; then
    if command -v mmdebstrap > /dev/null; then
        BASE_IMAGE=$(deploy/base-image.sh)
    else
        BASE_IMAGE=python:3.11-slim
    fi
fi

# Everything that the image is made from. Bytecode, tests and documents are not in it.
content() {
    echo "$BASE_IMAGE"
    find deploy/Dockerfile deploy/strip.py pyproject.toml requirements.lock \
        protos/gmem services/gmem clients/gmem \
        -type f ! -name '*.pyc' -print0 | LC_ALL=C sort -z | xargs -0 sha256sum
}
image=gmem:$(content | sha256sum | cut -c 1-12)

if docker image inspect "$image" > /dev/null 2>&1; then
    docker tag "$image" gmem:latest
    echo "$image"
    exit 0
fi

say "$image on $BASE_IMAGE"
# Wheels of another lock would only be in the way.
cmp --silent requirements.lock "$CONTEXT/requirements.lock" || rm -rf "$CONTEXT"
mkdir -p "$CONTEXT/wheels"
machine=$(uname -m)
# The image's Python is 3.11, whatever runs here.
"$PYTHON" -m pip download --quiet --disable-pip-version-check --require-hashes \
    --requirement requirements.lock --dest "$CONTEXT/wheels" --no-deps \
    --only-binary :all: --implementation cp --python-version 3.11 \
    --abi cp311 --abi abi3 --abi none --platform any \
    --platform "manylinux_2_28_$machine" --platform "manylinux_2_17_$machine" \
    --platform "manylinux2014_$machine"
rm -f "$CONTEXT"/wheels/gmem_emulator-*.whl
"$PYTHON" -m pip wheel --quiet --disable-pip-version-check --no-deps \
    --no-build-isolation --wheel-dir "$CONTEXT/wheels" .
cp requirements.lock deploy/strip.py "$CONTEXT/"

DOCKER_BUILDKIT=0 docker build --force-rm --build-arg "BASE_IMAGE=$BASE_IMAGE" \
    --file deploy/Dockerfile --tag "$image" --tag gmem:latest "$CONTEXT" >&2
# The first stage has no name and is of no further use.
docker image prune --force --filter label=gmem.stage=installed > /dev/null
say "$(($(docker image inspect --format '{{.Size}}' "$image") / 1000000)) MB"
echo "$image"
