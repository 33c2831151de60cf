# Sourced by the launch scripts: functions that read arguments and count GPUs.
# Changes no environment variable.
# shellcheck shell=bash
if [[ ${BASH_SOURCE[0]} == "$0" ]]; then
    sed -n '/^# shellcheck/q;/^#/!q;s/^# \{0,1\}//p' "$0"
    [[ ${1:-} == --help || ${1:-} == -h ]] && exit 0
    echo "$0: run the scripts of launch/torchrun or launch/slurm instead" >&2
    exit 2
fi

# Prints the comment at the top of a script: its usage.
print_help() {
    sed -n '2,${/^#SBATCH/q;/^# shellcheck/q;/^#/!q;s/^# \{0,1\}//p}' "$1"
}

# Ends the script with a sentence and code 2.
refuse() {
    echo "$0: $1" >&2
    exit 2
}

# require_number OPTION VALUE LOWEST HIGHEST: refuses every other value.
require_number() {
    if ! [[ $2 =~ ^(0|[1-9][0-9]{0,6})$ ]] || (($2 < $3 || $2 > $4)); then
        refuse "$1 $2: must be a whole number from $3 to $4"
    fi
}

# Prints the number of GPUs that CUDA gives one process of this machine: those of CUDA_VISIBLE_DEVICES up to the first
# name that is not a device, and only one if a MIG device is among them, because CUDA never gives a process two.
count_gpus() {
    local listed line gpus=0 count=0 name names=() mig=() uuids=()
    if ! command -v nvidia-smi >/dev/null || ! listed=$(nvidia-smi --list-gpus 2>/dev/null); then
        echo 0
        return
    fi
    while IFS= read -r line; do
        if [[ $line =~ ^GPU\ [0-9]+: ]]; then
            uuids[gpus]=$(sed -n 's/.*(UUID: \([^)]*\)).*/\1/p' <<<"$line") mig[gpus]=false
            gpus=$((gpus + 1))
        elif [[ $line =~ ^\ +MIG\  ]] && ((gpus)); then
            mig[gpus - 1]=true
        fi
    done <<<"$listed"
    if [[ -z ${CUDA_VISIBLE_DEVICES+set} ]]; then
        [[ " ${mig[*]} " == *" true "* ]] && gpus=1
        echo "$gpus"
        return
    fi
    IFS=, read -ra names <<<"$CUDA_VISIBLE_DEVICES" || true
    for name in "${names[@]}"; do
        name=${name//[[:space:]]/}
        local index=""
        if [[ $name == MIG-* ]]; then
            ((count)) || count=1
            break
        elif [[ $name =~ ^[0-9]{1,6}$ ]]; then
            ((10#$name < gpus)) && index=$((10#$name))
        elif [[ $name == GPU-* ]]; then
            local gpu
            for ((gpu = 0; gpu < gpus; gpu++)); do
                [[ ${uuids[gpu]} == "$name"* ]] && index=$gpu && break
            done
        fi
        [[ -n $index ]] || break
        if ${mig[index]}; then
            ((count)) || count=1
            break
        fi
        count=$((count + 1))
    done
    echo "$count"
}

# Prints the default number of ranks of a node: one per GPU, one without GPUs.
default_ranks() {
    local gpus
    gpus=$(count_gpus)
    echo "$((gpus > 0 ? gpus : 1))"
}

# Prints a secret with which the ranks of one start sign their messages in the run's key-value store, because the store
# takes writes from anyone who reaches its port.
new_secret() {
    head -c 32 /dev/urandom | od -An -v -tx1 | tr -d ' \n'
}

# Prints a free port of this machine.
free_port() {
    local port
    while
        port=$((20000 + (RANDOM * 32768 + RANDOM) % 12750))
        (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null
    do :; done
    echo "$port"
}

# await PROCESS: waits for its end, however many signals arrive, and returns its exit code. Polls twice a second: a
# `wait` that a signal interrupts while the process ends makes bash (5.2) forget the code.
await() {
    local never
    exec {never}<> <(:)
    while kill -0 "$1" 2>/dev/null; do
        read -r -t 0.5 -u "$never" || true
    done
    exec {never}>&-
    wait "$1" 2>/dev/null
}
