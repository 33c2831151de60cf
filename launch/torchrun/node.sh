#!/usr/bin/env bash
# One node of a run under torchrun; one_node.sh and hostfile.sh call it. By hand, on node I of N, all with the same
# address and port of node 0:
#
#   launch/torchrun/node.sh --nnodes N --node-rank I --master-addr HOST --master-port 29500 CONFIG.yaml [section.key=value ...]
#
# Options: --nproc-per-node G (default: the node's GPUs, else 1), --run-id NAME (the same on every node: keeps runs apart
# that are given one address and port by mistake), --ranks N (of all nodes; default: as many on each as here), --dry-run
# (print what would run). First it asks `doctor --config` whether the run can start here (layout, GPUs, output
# directories, free disk) and ends with its code if not; PREFLIGHT=no leaves that out.
# SIGTERM, SIGUSR1, Ctrl-C and a closed terminal let the run finish its step, save and end with exit code 75. This script
# hands them to the workers itself: torchrun would kill them 30 seconds after a SIGTERM, and does not survive SIGUSR1.
# Exit codes are the workers' own: 0 done, 2 bad configuration or data, 75 saved and to be started again, else 1.
# torchrun turns each of the last three into 1; the workers leave theirs in a status file.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launch/environment.sh
source "$here/../environment.sh"
python=${PYTHON:-python}

nnodes=1 node_rank=0 master_addr=127.0.0.1 master_port="" nproc="" ranks="" run_id="" dry_run=false
while [[ ${1:-} == --* ]]; do
    case $1 in
        --nnodes) nnodes=$2 && shift 2 ;;
        --node-rank) node_rank=$2 && shift 2 ;;
        --master-addr) master_addr=$2 && shift 2 ;;
        --master-port) master_port=$2 && shift 2 ;;
        --nproc-per-node) nproc=$2 && shift 2 ;;
        --ranks) ranks=$2 && shift 2 ;;
        --run-id) run_id=$2 && shift 2 ;;
        --dry-run) dry_run=true && shift ;;
        *) echo "$0: unknown option $1; see the comment at its top" >&2 && exit 2 ;;
    esac
done
if (($# == 0)); then
    echo "$0: CONFIG.yaml is missing; see the comment at its top" >&2
    exit 2
fi
if [[ -z $nproc ]]; then
    nproc=1
    if command -v nvidia-smi >/dev/null && gpus=$(nvidia-smi --list-gpus); then
        nproc=$(grep -c . <<<"$gpus")
    fi
fi
if [[ -n $master_port ]]; then
    where=(--nnodes "$nnodes" --node-rank "$node_rank" --master-addr "$master_addr" --master-port "$master_port")
    [[ -n $run_id ]] && where+=(--rdzv-id "$run_id")
elif ((nnodes == 1)); then
    where=(--standalone) # a free port of its own: several runs may share the node
else
    echo "$0: --master-port is missing; every node needs the same one" >&2
    exit 2
fi
command=("$python" -m torch.distributed.run "${where[@]}" --nproc-per-node "$nproc" --max-restarts 0
    -m megatron_embed train "$@")
check=("$python" -m megatron_embed doctor --config "$1" --ranks "${ranks:-$((nnodes * nproc))}" --ranks-per-node "$nproc"
    "${@:2}")
if $dry_run; then
    print_environment
    [[ ${PREFLIGHT:-yes} != no ]] && print_command "${check[@]}"
    print_command "${command[@]}"
    exit 0
fi

if [[ ${PREFLIGHT:-yes} != no ]]; then
    "${check[@]}" >&2 || exit
fi

# In a folder that nobody else may write to.
status_folder=$(mktemp -d "${TMPDIR:-/tmp}/megatron-embed-status.XXXXXX")
status=$status_folder/status
export MEGATRON_EMBED_STATUS_FILE=$status
trap 'rm -rf "$status_folder"' EXIT

# In a session of its own: a terminal's Ctrl-C would reach torchrun too, which gives its workers 30 seconds.
setsid "${command[@]}" &
agent=$!
# The workers are torchrun's children; before it has started any, there is nothing to save.
# shellcheck disable=SC2317  # called by the traps
pass_on() {
    local workers
    workers=$(cat "/proc/$agent/task/"*/children 2>/dev/null || true)
    if [[ -n ${workers// /} ]]; then
        # shellcheck disable=SC2086  # one process number per word
        kill -s "$1" $workers 2>/dev/null || true
    else
        kill -s TERM "$agent" 2>/dev/null || true
    fi
}
interrupted=false
trap 'interrupted=true; pass_on TERM' TERM INT HUP
trap 'interrupted=true; pass_on USR1' USR1
while true; do # a signal ends `wait`, not the run
    interrupted=false code=0
    wait "$agent" || code=$?
    $interrupted || break
done
if ((code != 0)) && [[ -s $status ]]; then
    left=$(sed -n 's/.*"exit_code": *\([0-9][0-9]*\).*/\1/p' "$status")
    code=${left:-$code}
fi
exit "$code"
