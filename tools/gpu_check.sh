#!/usr/bin/env bash
# Check the trainer on the GPUs of this machine in at most eight minutes and print a table: first what has failed on GPUs
# before (the default attention kernel, experts without Transformer Engine), then dropout replay, time and memory of the
# loss, memory of a checkpoint, speed beside Sentence Transformers; then loss curves of every kernel and of two ranks in
# every layout against a CPU run, a stopped and resumed run, memory compared with `plan`, and the tests that need a GPU.
# Needs no network and no model. See docs/gpu_check.md.
#
#   tools/gpu_check.sh [--output gpu_check.md] [--minutes 7.5] [--model DIR]  # PYTHON=python3 sets the interpreter
#   tools/gpu_check.sh --cpu                  # the same script on CPU ranks, to test the script itself
#   tools/gpu_check.sh --packages FILE ...    # first unpack packages that the interpreter lacks: tools/gpu_packages.sh
#   tools/gpu_check.sh --wheels DIR ...       # the same from wheels
#   tools/gpu_check.sh --only 'Qwen3|float32, TP'      # only some checks, e.g. those that an earlier call did not run
#
# The table goes to $OUT/gpu_check.md and .json if OUT is set. Every check has its own time limit; checks that do not
# fit into --minutes are listed as not run.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
cd "$here/.."
# shellcheck source=launch/environment.sh
source launch/environment.sh
python=${PYTHON:-python3}

new_site() {
    site=$(mktemp -d "${TMPDIR:-/tmp}/megatron-embed-site.XXXXXX")
    trap 'rm -rf "$site"' EXIT
}

arguments=()
while (($#)); do
    case $1 in
        --packages)
            [[ -f ${2:?an archive is missing} ]] || { echo "$0: --packages $2: no such file" >&2 && exit 2; }
            new_site
            tar -C "$site" -xJf "$2"
            shift 2
            ;;
        --wheels)
            wheels=("${2:?a directory is missing}"/*.whl)
            [[ -e ${wheels[0]} ]] || { echo "$0: --wheels $2: no .whl file there" >&2 && exit 2; }
            new_site
            "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target "$site" "${wheels[@]}"
            shift 2
            ;;
        *) arguments+=("$1") && shift ;;
    esac
done
[[ -z ${site:-} ]] || export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"
code=0
"$python" tools/gpu_check.py "${arguments[@]}" || code=$?
exit "$code"
