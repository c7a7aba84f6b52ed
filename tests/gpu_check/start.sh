#!/bin/sh
# On the GPU machine, from the repository's root with .gpu/ beside it: `sh tests/gpu_check/start.sh --minutes 6 --out FOLDER`.
# Installs into a folder of its own, and runs the check. No network.
set -eu
cd "$(dirname "$0")/../.."
PYTHON=${PYTHON:-python3}
site=$(mktemp -d)
"$PYTHON" -W ignore -m tarfile -e .gpu/triton.tar.xz "$site/triton" &
triton=$!
"$PYTHON" -W ignore -m tarfile -e .gpu/ray.tar.xz "$site" &
ray=$!
"$PYTHON" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target "$site/wheels" .gpu/wheels/*.whl
wait $triton
wait $ray
mkdir -p "$site/populace"
for name in configs kernels population storage workers; do ln -sfn "$PWD/$name" "$site/populace/$name"; done
cp -r .gpu/populace-0.1.0.dist-info "$site/"
# Uncompiled, Ray's agents start too slowly for their raylet.
"$PYTHON" -m compileall -q -j 0 "$site/ray" "$site/wheels" || true
export PYTHONPATH="$site:$site/wheels:$PWD${PYTHONPATH:+:$PYTHONPATH}" TRITON_CACHE_DIR="$site/triton"
export RAY_AUTH_MODE=disabled RAY_USAGE_STATS_ENABLED=0 HF_HUB_OFFLINE=1 POPULACE_CACHE="$site/cache" POPULACE_KEYS="$site/keys"
exec "$PYTHON" -m tests.gpu_check "$@"
