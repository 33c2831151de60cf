#!/usr/bin/env bash
# Everything that the GPUs of this machine can prove in some ten minutes, and a table of it: what is installed, loss
# curves of every kernel and of two ranks in every layout against a CPU run, a run that is stopped and resumed, memory of
# a decoder beside what `plan` expects of it, and the tests that need a GPU. Needs no network and no model.
#
#   tools/gpu_check.sh [--output gpu_check.md] [--minutes 9] [--model DIR]    # PYTHON=python3 names the interpreter
#   tools/gpu_check.sh --cpu                  # the same script on CPU ranks, smaller: does it work at all?
#   tools/gpu_check.sh --wheels DIR ...       # what the interpreter lacks, carried there as wheels, is unpacked first
#   tools/gpu_check.sh --only 'Qwen3|float32, TP'      # what an earlier call had no time for
#
# --minutes are kept: checks that would take longer stand in the table as not run.
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
