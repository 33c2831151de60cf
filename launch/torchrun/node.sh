#!/usr/bin/env bash
# One node of a run under torchrun; one_node.sh and hostfile.sh call it. By hand, on node I of N, with the address and
# port of node 0 on all of them:
#
#   launch/torchrun/node.sh --nnodes N --node-rank I --master-addr HOST --master-port 29500 \
#       CONFIG.yaml [section.key=value ...]
#
# Options:
#   --nproc-per-node G  ranks of this node (default: its number of GPUs, else 1)
#   --ranks N           ranks of all nodes (default: as many on each node as here)
#   --run-id NAME       the same on every node; separates runs that are given one address and port by mistake
#   --dry-run           print what would run
#   --count-gpus        print the default number of ranks of this node
#
# First `doctor --config` checks whether the run can start here (layout, GPUs, output directories, free disk); if not,
# the script ends with its exit code. PREFLIGHT=no skips that. SIGTERM, SIGUSR1, Ctrl-C and a closed terminal let the
# run finish its step, save and end with exit code 75. This script passes them to the workers itself: torchrun would
# kill them 30 seconds after a SIGTERM, and does not survive SIGUSR1. Exit codes are those of the workers: 0 done, 2 bad
# configuration or data, 75 saved and to be started again, else 1. torchrun turns each of the last three into 1; the
# workers write theirs to a status file.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launch/environment.sh
source "$here/../environment.sh"
# shellcheck source=launch/functions.sh
source "$here/../functions.sh"
python=${PYTHON:-python}

nnodes=1 node_rank=0 master_addr=127.0.0.1 master_port="" nproc="" ranks="" run_id="" dry_run=false
while [[ ${1:-} == -* ]]; do
    option=${1%%=*}
    case $option in
        --help | -h) print_help "${BASH_SOURCE[0]}" && exit 0 ;;
        --dry-run) dry_run=true && shift && continue ;;
        --count-gpus) default_ranks && exit 0 ;;
        --nnodes | --node-rank | --master-addr | --master-port | --nproc-per-node | --ranks | --run-id) ;;
        *) refuse "unknown option $1; see $0 --help" ;;
    esac
    if [[ $1 == *=* ]]; then
        value=${1#*=}
        shift
    else
        (($# > 1)) || refuse "$option needs a value; see $0 --help"
        value=$2
        shift 2
    fi
    [[ -n $value ]] || refuse "$option needs a value; see $0 --help"
    case $option in
        --nnodes) require_number "$option" "$value" 1 100000 && nnodes=$value ;;
        --node-rank) require_number "$option" "$value" 0 100000 && node_rank=$value ;;
        --master-addr) master_addr=$value ;;
        --master-port) require_number "$option" "$value" 1 65535 && master_port=$value ;;
        --nproc-per-node) require_number "$option" "$value" 1 100000 && nproc=$value ;;
        --ranks) require_number "$option" "$value" 1 1000000 && ranks=$value ;;
        --run-id) run_id=$value ;;
    esac
done
if (($# == 0)) || [[ -z $1 ]]; then
    refuse "CONFIG.yaml is missing; see $0 --help"
fi
if ((node_rank >= nnodes)); then
    refuse "--node-rank $node_rank of --nnodes $nnodes: nodes count from 0, so the last one is $((nnodes - 1))"
fi
if [[ -z $nproc ]]; then
    nproc=$(default_ranks)
fi
if [[ -n $master_port ]]; then
    where=(--nnodes "$nnodes" --node-rank "$node_rank" --master-addr "$master_addr" --master-port "$master_port")
    [[ -n $run_id ]] && where+=(--rdzv-id "$run_id")
elif ((nnodes == 1)); then
    # A free port, since several runs may share the node. Not --standalone: its rendezvous unpickles what anyone who
    # reaches the port writes into it.
    where=(--nnodes 1 --node-rank 0 --master-addr 127.0.0.1 --master-port "$(free_port)"
        --rdzv-id "${run_id:-$(id -un)-$(date +%s)-$$}")
else
    refuse "--master-port is missing; every node needs the same one"
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

if ((nnodes == 1)); then # with several nodes hostfile.sh, or whoever starts them, gives all nodes the same one
    export MEGATRON_EMBED_SECRET=${MEGATRON_EMBED_SECRET:-$(new_secret)}
fi

# The workers are children of torchrun; before it has started any, there is nothing to save.
signalled=false agent=""
# shellcheck disable=SC2317  # called by the traps
pass_on() {
    signalled=true
    [[ -n $agent ]] || return 0
    local workers
    workers=$(cat "/proc/$agent/task/"*/children 2>/dev/null || true)
    if [[ -n ${workers// /} ]]; then
        # shellcheck disable=SC2086  # one process number per word
        kill -s "$1" $workers 2>/dev/null || true
    else
        kill -s TERM "$agent" 2>/dev/null || true
    fi
}
trap 'pass_on TERM' TERM INT HUP
trap 'pass_on USR1' USR1

# Waits for $agent; its exit code is in $code.
await_agent() {
    if $signalled; then # the signal came before there was a process
        pass_on TERM
    fi
    code=0
    await "$agent" || code=$?
}

if [[ ${PREFLIGHT:-yes} != no ]]; then
    "${check[@]}" >&2 &
    agent=$!
    await_agent
    if $signalled; then
        exit 75
    fi
    ((code == 0)) || exit "$code"
    agent=""
fi

# A folder that nobody else may write to.
status_folder=$(mktemp -d "${TMPDIR:-/tmp}/megatron-embed-status.XXXXXX")
status=$status_folder/status
export MEGATRON_EMBED_STATUS_FILE=$status
trap 'rm -rf "$status_folder"' EXIT

# A separate session: Ctrl-C of a terminal would otherwise reach torchrun too, which gives its workers 30 seconds.
setsid "${command[@]}" &
agent=$!
await_agent
if ((code != 0)); then
    if [[ -s $status ]]; then
        left=$(sed -n 's/.*"exit_code": *\([0-9][0-9]*\).*/\1/p' "$status")
        code=${left:-$code}
        if ((code == 2)); then # torchrun's own lines come last
            message=$(sed -n 's/.*"message": "\(.*\)"}$/\1/p' "$status")
            printf 'megatron-embed: error: %b\n' "${message//\\\"/\"}" >&2
        fi
    elif $signalled; then # there was no worker yet to report it
        code=75
    fi
fi
exit "$code"
