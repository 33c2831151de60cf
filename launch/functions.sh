# Sourced by the launch scripts: how they read their arguments and count GPUs.
# Changes nothing of the environment.
# shellcheck shell=bash
if [[ ${BASH_SOURCE[0]} == "$0" ]]; then
    sed -n '/^# shellcheck/q;/^#/!q;s/^# \{0,1\}//p' "$0"
    [[ ${1:-} == --help || ${1:-} == -h ]] && exit 0
    echo "$0: run the scripts of launch/torchrun or launch/slurm instead" >&2
    exit 2
fi

# Prints the comment at a script's top, which says how it is used.
print_help() {
    sed -n '2,${/^#SBATCH/q;/^# shellcheck/q;/^#/!q;s/^# \{0,1\}//p}' "$1"
}

# Ends the script with a sentence and code 2.
refuse() {
    echo "$0: $1" >&2
    exit 2
}

# require_number OPTION VALUE LOWEST HIGHEST: refuses anything else.
require_number() {
    if ! [[ $2 =~ ^(0|[1-9][0-9]{0,6})$ ]] || (($2 < $3 || $2 > $4)); then
        refuse "$1 $2: must be a whole number from $3 to $4"
    fi
}

# Prints how many GPUs CUDA gives one process of this machine: those of CUDA_VISIBLE_DEVICES up to the first name that
# is no device, and one alone where a MIG device is among them: CUDA never gives a process two.
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
        local found=""
        if [[ $name == MIG-* ]]; then
            ((count)) || count=1
            break
        elif [[ $name =~ ^[0-9]{1,6}$ ]]; then
            ((10#$name < gpus)) && found=$((10#$name))
        elif [[ $name == GPU-* ]]; then
            local number
            for ((number = 0; number < gpus; number++)); do
                [[ ${uuids[number]} == "$name"* ]] && found=$number && break
            done
        fi
        [[ -n $found ]] || break
        if ${mig[found]}; then
            ((count)) || count=1
            break
        fi
        count=$((count + 1))
    done
    echo "$count"
}

# Prints how many ranks a node has that does not say: one per GPU, one where there is none.
default_ranks() {
    local gpus
    gpus=$(count_gpus)
    echo "$((gpus > 0 ? gpus : 1))"
}

# Prints what the ranks of one start sign their words with in the run's key-value store, which takes writes from anyone
# who reaches its port.
new_secret() {
    head -c 32 /dev/urandom | od -An -v -tx1 | tr -d ' \n'
}

# Prints a port of this machine at which nobody listens.
free_port() {
    local port
    while
        port=$((20000 + (RANDOM * 32768 + RANDOM) % 12750))
        (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null
    do :; done
    echo "$port"
}

# await PROCESS: waits for its end, however many signals come, and gives its exit code. Looks twice a second: a `wait`
# that a signal breaks off while the process ends makes bash (5.2) forget the code.
await() {
    local never
    exec {never}<> <(:)
    while kill -0 "$1" 2>/dev/null; do
        read -r -t 0.5 -u "$never" || true
    done
    exec {never}>&-
    wait "$1" 2>/dev/null
}
