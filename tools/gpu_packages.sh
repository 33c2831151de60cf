#!/usr/bin/env bash
# Pack what a bare image of Python 3.12 and torch lacks for tools/gpu_check.sh into one archive of under 64 MiB:
#
#   tools/gpu_packages.sh OUT.tar.xz          # PYTHON=python3 sets the interpreter whose pip downloads
#
# Megatron-Core 0.19.2 and, with the pins of requirements-cpu.txt, what the checks import, without tests and type stubs.
set -euo pipefail
if [[ -z ${1:-} || $1 == -* ]]; then
    sed -n '2,${/^#/!q;s/^# \{0,1\}//p}' "$0"
    [[ ${1:-} == --help || ${1:-} == -h ]] && exit 0
    exit 2
fi
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=${PYTHON:-python3}
names=(transformers tokenizers safetensors huggingface_hub hf-xet sentence-transformers scipy scikit-learn joblib
    threadpoolctl narwhals numpy PyYAML regex tqdm packaging psutil xxhash pytrec_eval-terrier httpx2 httpcore2 h11 anyio
    idna truststore typer click shellingham rich Pygments markdown-it-py mdurl annotated-doc filelock fsspec
    typing_extensions pytest pluggy iniconfig)
folder=$(mktemp -d "${TMPDIR:-/tmp}/megatron-embed-packages.XXXXXX")
trap 'rm -rf "$folder"' EXIT
pins=(megatron-core==0.19.2)
for name in "${names[@]}"; do
    pins+=("$(grep -m 1 "^$name==" "$here/../requirements-cpu.txt")") ||
        { echo "$0: requirements-cpu.txt has no pin of $name" >&2 && exit 1; }
done
platforms=()
for glibc in 2_28 2_27 2_24 2_17 2_12; do
    platforms+=(--platform "manylinux_${glibc}_x86_64")
done
"$python" -m pip download -q --no-deps --only-binary=:all: "${platforms[@]}" --platform manylinux2014_x86_64 \
    --platform manylinux2010_x86_64 --python-version 3.12 --implementation cp --abi cp312 --abi abi3 --abi none \
    --dest "$folder/wheels" "${pins[@]}"
for wheel in "$folder"/wheels/*.whl; do
    "$python" -m zipfile -e "$wheel" "$folder/site"
done
find "$folder/site" -name '*.pyi' -delete
find "$folder/site/scipy" "$folder/site/sklearn" "$folder/site/joblib" -type d -name tests -prune -exec rm -rf {} +
tar -C "$folder/site" -c . | xz -T0 -3 >"$1"
size=$(stat -c %s "$1")
echo "$1: $((size / 1048576)) MiB"
((size < 64 * 1048576)) || { echo "$0: more than 64 MiB" >&2 && exit 1; }
