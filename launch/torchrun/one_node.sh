#!/usr/bin/env bash
# A run on all GPUs of this machine, or on --nproc-per-node ranks:
#
#   launch/torchrun/one_node.sh [--nproc-per-node 8] [--dry-run] CONFIG.yaml [section.key=value ...]
#
# Started again after exit code 75 or a crash, it resumes from its last checkpoint.
set -euo pipefail
if [[ ${1:-} == --help || ${1:-} == -h ]]; then
    sed -n '2,${/^#/!q;s/^# \{0,1\}//p}' "$0"
    exit 0
fi
exec "$(dirname "${BASH_SOURCE[0]}")/node.sh" "$@"
