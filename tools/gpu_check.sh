#!/usr/bin/env bash
# Everything that the GPUs of this machine can prove in some ten minutes, and a table of it: what is installed, loss
# curves of every backend and of two ranks in every layout against a CPU run, the tests that need a GPU, and a benchmark
# with utilization and memory beside what `plan` expects.
#
#   tools/gpu_check.sh [--output gpu_check.md]       # PYTHON=python names the interpreter
#   tools/gpu_check.sh --cpu                         # the same script on CPU ranks, smaller: does it work at all?
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
cd "$here/.."
# shellcheck source=launch/environment.sh
source launch/environment.sh
exec "${PYTHON:-python}" tools/gpu_check.py "$@"
