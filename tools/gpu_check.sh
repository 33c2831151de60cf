#!/usr/bin/env bash
# Check the trainer on the GPUs of this machine in about ten minutes and print a table: installed packages, loss curves
# of every kernel and of two ranks in every layout against a CPU run, a stopped and resumed run, memory of a decoder
# compared with `plan`, and the tests that need a GPU. Needs no network and no model.
#
#   tools/gpu_check.sh [--output gpu_check.md] [--minutes 9] [--model DIR]    # PYTHON=python3 sets the interpreter
#   tools/gpu_check.sh --cpu                  # the same script on CPU ranks, to test the script itself
#   tools/gpu_check.sh --wheels DIR ...       # first unpack packages that the interpreter lacks from wheels
#   tools/gpu_check.sh --only 'Qwen3|float32, TP'      # only some checks, e.g. those that an earlier call did not run
#
# Checks that do not fit into --minutes are listed as not run.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
cd "$here/.."
# shellcheck source=launch/environment.sh
source launch/environment.sh
python=${PYTHON:-python3}

arguments=()
while (($#)); do
    case $1 in
        --wheels)
            wheels=("${2:?a directory is missing}"/*.whl)
            [[ -e ${wheels[0]} ]] || { echo "$0: --wheels $2: no .whl file there" >&2 && exit 2; }
            site=$(mktemp -d "${TMPDIR:-/tmp}/megatron-embed-site.XXXXXX")
            trap 'rm -rf "$site"' EXIT
            "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target "$site" "${wheels[@]}"
            export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"
            shift 2
            ;;
        *) arguments+=("$1") && shift ;;
    esac
done
code=0
"$python" tools/gpu_check.py "${arguments[@]}" || code=$?
exit "$code"
