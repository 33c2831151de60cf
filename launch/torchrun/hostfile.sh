#!/usr/bin/env bash
# A run on the hosts of a file; the first one is node 0. Needs ssh without a password, and this directory and the data
# at the same path on every host.
#
#   launch/torchrun/hostfile.sh HOSTFILE [--master-port 29500] [--dry-run] CONFIG.yaml [section.key=value ...]
#
# A line of HOSTFILE is `HOST [slots=N] [# comment]`: N ranks on it, at least 1; default: its number of GPUs. HOST may
# be user@name; the user is for ssh only. Empty lines are skipped, everything else is refused.
#
# SIGTERM, SIGUSR1 and Ctrl-C (as SIGTERM) go to every node. The exit code is that of node 0. PYTHON, PREFLIGHT and the
# variables that begin with NCCL_, GLOO_, UCX_, TORCH_ or PYTORCH_ are passed to the hosts.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launch/functions.sh
source "$here/../functions.sh"
read -ra ssh <<<"${SSH:-ssh -o BatchMode=yes}"

if [[ ${1:-} == --help || ${1:-} == -h ]]; then
    print_help "${BASH_SOURCE[0]}"
    exit 0
fi
[[ -n ${1:-} && ${1:-} != -* ]] || refuse "HOSTFILE is missing, the first argument; see $0 --help"
hostfile=$1
shift
port=29500 dry_run=false
while [[ ${1:-} == -* ]]; do
    case $1 in
        --help | -h) print_help "${BASH_SOURCE[0]}" && exit 0 ;;
        --master-port)
            (($# > 1)) || refuse "--master-port needs a value; see $0 --help"
            port=$2 && shift 2
            ;;
        --master-port=*) port=${1#*=} && shift ;;
        --dry-run) dry_run=true && shift ;;
        *) refuse "unknown option $1; see $0 --help" ;;
    esac
done
require_number --master-port "$port" 1 65535
[[ -n ${1:-} ]] || refuse "CONFIG.yaml is missing; see $0 --help"
[[ -f $hostfile && -r $hostfile ]] || refuse "$hostfile: not a readable file; name a file of hosts, one per line"
# hosts: for ssh; addresses: without the user; slots: empty if the line has none.
hosts=() addresses=() slots=() line_number=0
name='[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?|[0-9A-Fa-f:]*:[0-9A-Fa-f:]*:[0-9A-Fa-f:.]*' # the latter: IPv6
pattern="^(([A-Za-z0-9_][A-Za-z0-9._-]*@)?($name))([[:space:]]+slots=([1-9][0-9]{0,3}))?[[:space:]]*\$"
while IFS= read -r line || [[ -n $line ]]; do
    line_number=$((line_number + 1)) text=${line%$'\r'}
    text=${text#"${text%%[![:space:]]*}"}
    if [[ $text == \#* ]]; then
        continue
    fi
    text=${text%%[[:space:]]#*}
    if [[ -z ${text//[[:space:]]/} ]]; then
        continue
    fi
    [[ $text =~ $pattern ]] || refuse "$hostfile:$line_number: ${line@Q}: a line is \`HOST [slots=N] [# comment]\`, N a \
whole number from 1 to 9999, without blanks around the ="
    address=${BASH_REMATCH[3]}
    for other in "${!addresses[@]}"; do
        [[ ${addresses[other],,} != "${address,,}" ]] || refuse "$hostfile:$line_number: $address is given twice; write \
it once, with slots=N for its ranks"
    done
    hosts+=("${BASH_REMATCH[1]}") addresses+=("$address") slots+=("${BASH_REMATCH[6]}")
done <"$hostfile"
((${#hosts[@]} > 0)) || refuse "$hostfile names no host"

# If some lines have slots and some do not, count the GPUs of the others: every node must know the number of all ranks.
if [[ -n ${slots[*]//[[:space:]]/} ]] && ! $dry_run; then
    for node in "${!hosts[@]}"; do
        [[ -n ${slots[node]} ]] && continue
        printf -v question 'cd %q && %q --count-gpus' "$PWD" "$here/node.sh"
        slots[node]=$("${ssh[@]}" -- "${hosts[node]}" "$question" </dev/null) || slots[node]=""
        [[ ${slots[node]} =~ ^[1-9][0-9]*$ ]] ||
            refuse "${hosts[node]}: cannot count its GPUs by ssh; write slots=N after it in $hostfile"
    done
fi
ranks=0 # of all hosts; empty if one of them has no slots
for count in "${slots[@]}"; do
    [[ -n $ranks && -n $count ]] && ranks=$((ranks + count)) || ranks=""
done

# The command of node I, as one word for ssh; it writes its process id to a file, so that signals can be passed on.
run_id="$(id -un)-$(date +%s)-$$"
# A name that nobody can guess, so that nobody can put a file or link there first; noclobber refuses an existing one.
pid_file="/tmp/megatron-embed-$(od -An -N16 -tx1 /dev/urandom | tr -d ' \n')"
node_command() {
    local options=(--nnodes "${#hosts[@]}" --node-rank "$1" --master-addr "${MASTER_ADDR:-${addresses[0]}}"
        --master-port "$port" --run-id "$run_id")
    [[ -n $ranks ]] && options+=(--ranks "$ranks")
    [[ -n ${slots[$1]} ]] && options+=(--nproc-per-node "${slots[$1]}")
    local line name variables=("PYTHON=${PYTHON:-python}" "PREFLIGHT=${PREFLIGHT:-yes}")
    while read -r name; do
        [[ $name =~ ^(NCCL|GLOO|UCX|TORCH|PYTORCH)_ ]] && variables+=("$name=${!name}")
    done < <(compgen -e)
    printf -v line '%q ' env "${variables[@]}" "$here/node.sh" "${options[@]}" "${@:2}"
    # The secret comes through stdin, because other users of the host can read arguments.
    printf 'cd %q && read -r MEGATRON_EMBED_SECRET && export MEGATRON_EMBED_SECRET && ' "$PWD"
    printf '(umask 077 && set -C && echo $$ >%s-%d) && exec %s' "$pid_file" "$1" "$line"
}
if $dry_run; then
    for node in "${!hosts[@]}"; do
        echo "# on ${hosts[$node]}"
        node_command "$node" "$@"
        echo
    done
    exit 0
fi
secret=${MEGATRON_EMBED_SECRET:-$(new_secret)}
# shellcheck disable=SC2317  # called by the traps
pass_on() {
    local node
    for node in "${!hosts[@]}"; do
        # A signal in the first seconds waits for the file; a node without one after that has ended.
        "${ssh[@]}" -- "${hosts[$node]}" "for i in 1 2 3 4 5 6; do test -s $pid_file-$node && break; sleep 0.5; done; \
kill -s $1 \$(cat $pid_file-$node)" </dev/null &
    done
}
trap 'pass_on TERM' TERM INT
trap 'pass_on USR1' USR1
pids=()
for node in "${!hosts[@]}"; do
    "${ssh[@]}" -- "${hosts[$node]}" "$(node_command "$node" "$@")" <<<"$secret" &
    pids+=($!)
done
codes=()
for pid in "${pids[@]}"; do
    code=0
    await "$pid" || code=$?
    codes+=("$code")
done
for node in "${!hosts[@]}"; do
    "${ssh[@]}" -- "${hosts[$node]}" "rm -f $pid_file-$node" || true
done
exit "${codes[0]}"
