#!/usr/bin/env bash
# A run on the hosts of a file, one per line, optionally with `slots=G` (ranks on it; default: its GPUs). The first host
# is node 0. Needs ssh without a password, and this directory and the data at the same path on every host.
#
#   launch/torchrun/hostfile.sh HOSTFILE [--master-port 29500] [--dry-run] CONFIG.yaml [section.key=value ...]
#
# SIGTERM, SIGUSR1 and Ctrl-C (as SIGTERM) go to every node. The exit code is node 0's. Of this shell's environment PYTHON and PREFLIGHT go along, and what
# begins with NCCL_, GLOO_, UCX_, TORCH_ or PYTORCH_.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
read -ra ssh <<<"${SSH:-ssh -o BatchMode=yes}"

hostfile=${1:?HOSTFILE is missing; see the comment at the top}
shift
port=29500 dry_run=false
while [[ ${1:-} == --* ]]; do
    case $1 in
        --master-port) port=$2 && shift 2 ;;
        --dry-run) dry_run=true && shift ;;
        *) echo "$0: unknown option $1; see the comment at its top" >&2 && exit 2 ;;
    esac
done
hosts=() slots=()
while read -r host rest; do
    [[ -z $host || $host == \#* ]] && continue
    hosts+=("$host")
    [[ ${rest:-} =~ slots=([0-9]+) ]] && slots+=("${BASH_REMATCH[1]}") || slots+=("")
done <"$hostfile"
if ((${#hosts[@]} == 0)); then
    echo "$0: $hostfile names no host" >&2
    exit 2
fi

ranks=0 # of all hosts; empty where one of them does not say its own
for count in "${slots[@]}"; do
    [[ -n $ranks && -n $count ]] && ranks=$((ranks + count)) || ranks=""
done

# What node I runs, as one word for ssh; its process number goes to a file, so that a signal can follow.
run_id="$(id -un)-$(date +%s)-$$"
# A name that nobody can guess, where nobody else can have put a file or link: noclobber refuses one that is there.
secret=$(od -An -N16 -tx1 /dev/urandom | tr -d ' \n')
pid_file="/tmp/megatron-embed-$secret"
node_command() {
    local options=(--nnodes "${#hosts[@]}" --node-rank "$1" --master-addr "${MASTER_ADDR:-${hosts[0]}}"
        --master-port "$port" --run-id "$run_id")
    [[ -n $ranks ]] && options+=(--ranks "$ranks")
    [[ -n ${slots[$1]} ]] && options+=(--nproc-per-node "${slots[$1]}")
    local line name variables=("PYTHON=${PYTHON:-python}" "PREFLIGHT=${PREFLIGHT:-yes}")
    while read -r name; do
        [[ $name =~ ^(NCCL|GLOO|UCX|TORCH|PYTORCH)_ ]] && variables+=("$name=${!name}")
    done < <(compgen -e)
    printf -v line '%q ' env "${variables[@]}" "$here/node.sh" "${options[@]}" "${@:2}"
    printf 'cd %q && (umask 077 && set -C && echo $$ >%s-%d) && exec %s' "$PWD" "$pid_file" "$1" "$line"
}
if $dry_run; then
    for node in "${!hosts[@]}"; do
        echo "# on ${hosts[$node]}"
        node_command "$node" "$@"
        echo
    done
    exit 0
fi
pids=()
for node in "${!hosts[@]}"; do
    "${ssh[@]}" "${hosts[$node]}" "$(node_command "$node" "$@")" &
    pids+=($!)
done
# shellcheck disable=SC2317  # called by the traps
pass_on() {
    local node
    for node in "${!hosts[@]}"; do
        "${ssh[@]}" "${hosts[$node]}" "kill -s $1 \$(cat $pid_file-$node)" || true
    done
}
interrupted=false
trap 'interrupted=true; pass_on TERM' TERM INT
trap 'interrupted=true; pass_on USR1' USR1
codes=()
for pid in "${pids[@]}"; do
    while true; do # a signal ends `wait`, not the run
        interrupted=false code=0
        wait "$pid" || code=$?
        $interrupted || break
    done
    codes+=("$code")
done
for node in "${!hosts[@]}"; do
    "${ssh[@]}" "${hosts[$node]}" "rm -f $pid_file-$node" || true
done
exit "${codes[0]}"
