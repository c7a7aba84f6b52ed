#!/bin/sh
# Fills .gpu/ with what start.sh needs on a machine without a network that has Python 3.12, PyTorch, Triton, transformers and
# peft (of the versions of `make test-mirror`) and nothing else: a few wheels, Ray without what a run doesn't use, and Triton's
# binaries for sm_90. PYTHON: one with that torch and Triton, which makes the binaries here.
set -eu
cd "$(dirname "$0")/../.."
rm -rf .gpu && mkdir -p .gpu/wheels
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

locked() { # the versions of constraints.txt
    for name in "$@"; do grep -i "^$name==" constraints.txt || { echo "constraints.txt has no $name" >&2; exit 1; }; done
}
download() { # FOLDER REQUIREMENT...
    folder=$1 && shift
    "$PYTHON" -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
        --platform manylinux_2_34_x86_64 --platform manylinux_2_28_x86_64 --platform manylinux_2_27_x86_64 \
        --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 --platform any -d "$folder" "$@"
}

download .gpu/wheels $(locked omegaconf obstore cryptography cffi pycparser securesystemslib jsonschema referencing rpds-py \
    jsonschema-specifications)

# Without its jar, its pages and its libraries for training and serving.
download "$scratch" $(locked ray)
"$PYTHON" -m zipfile -e "$scratch"/ray-*.whl "$scratch/site"
(cd "$scratch/site" && rm -rf ray/jars ray/dashboard/client/build ray/rllib ray/tune ray/train ray/llm ray/data ray/air ray/serve)
# zipfile forgets who may be run.
chmod -R u+rwX,go+rX "$scratch/site" && find "$scratch/site/ray/core" "$scratch/site/ray/_private" -type f ! -name '*.py*' -exec chmod +x {} +
tar -C "$scratch/site" -cJf .gpu/ray.tar.xz .

TRITON_CACHE_DIR="$scratch/triton" OMP_NUM_THREADS=1 "$PYTHON" -m tests.gpu_check.cache
tar -C "$scratch/triton" -cJf .gpu/triton.tar.xz .

mkdir -p .gpu/populace-0.1.0.dist-info
printf 'Metadata-Version: 2.1\nName: populace\nVersion: 0.1.0\n' > .gpu/populace-0.1.0.dist-info/METADATA

packed=$(du -sk .gpu | cut -f1)
tree=$(git ls-files -z --cached --others --exclude-standard | xargs -0 du -ck 2>/dev/null | tail -1 | cut -f1)
echo "packed $packed KiB, with the tree $((packed + tree)) KiB of 65536"
test $((packed + tree)) -le 65536
