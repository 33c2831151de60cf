# Sourced by every launch script: environment variables of the processes of a run. A variable that is already set keeps
# its value. All of them are harmless on CPU ranks.
# shellcheck shell=bash
if [[ ${BASH_SOURCE[0]} == "$0" ]]; then
    sed -n '/^# shellcheck/q;/^#/!q;s/^# \{0,1\}//p' "$0"
    [[ ${1:-} == --help || ${1:-} == -h ]] && exit 0
    echo "$0: run the scripts of launch/torchrun or launch/slurm instead" >&2
    exit 2
fi

# CUDA_DEVICE_MAX_CONNECTIONS and the memory allocator's variables are set by megatron_embed itself, which knows layout,
# GPU and torch's version (megatron_embed/platform/cuda_environment.py).
# On an unstable link: about 2 s instead of 0.5 s before a retransmission gives up.
export NCCL_IB_TIMEOUT="${NCCL_IB_TIMEOUT:-19}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
export TOKENIZERS_PARALLELISM="${TOKENIZERS_PARALLELISM:-false}"
export PYTHONUNBUFFERED=1
# The process that hosts the run's store has two connections of every rank; Python processes raise their limit alone.
ulimit -Sn "$(ulimit -Hn)" 2>/dev/null || true

LAUNCH_VARIABLES=(NCCL_IB_TIMEOUT OMP_NUM_THREADS TOKENIZERS_PARALLELISM PYTHONUNBUFFERED)

# Prints NAME=VALUE of every variable that these scripts set.
print_environment() {
    local name
    for name in "${LAUNCH_VARIABLES[@]}"; do
        printf 'export %s=%q\n' "$name" "${!name}"
    done
}

# Prints a command so that it can be pasted into a shell.
print_command() {
    printf '%q ' "$@"
    printf '\n'
}
