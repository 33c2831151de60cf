# Sourced by every launch script: environment variables of the processes of a run. A variable that is already set keeps
# its value. All of them are harmless on CPU ranks.
# shellcheck shell=bash
if [[ ${BASH_SOURCE[0]} == "$0" ]]; then
    sed -n '/^# shellcheck/q;/^#/!q;s/^# \{0,1\}//p' "$0"
    [[ ${1:-} == --help || ${1:-} == -h ]] && exit 0
    echo "$0: run the scripts of launch/torchrun or launch/slurm instead" >&2
    exit 2
fi

# Megatron orders tensor-parallel communication and compute by CUDA's submission order.
export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}"
# Micro-batches of varying sizes fragment the caching allocator: without this a 70B run that fits runs out of memory.
export PYTORCH_CUDA_ALLOC_CONF="${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}"
# A collective that fails ends the process instead of hanging it.
export TORCH_NCCL_ASYNC_ERROR_HANDLING="${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1}"
# Otherwise tensors that NCCL's streams use are freed late, and memory grows.
export TORCH_NCCL_AVOID_RECORD_STREAMS="${TORCH_NCCL_AVOID_RECORD_STREAMS:-1}"
# NVLink SHARP takes memory on every GPU of a node and does not speed up messages of a few MB.
export NCCL_NVLS_ENABLE="${NCCL_NVLS_ENABLE:-0}"
# On an unstable link: about 2 s instead of 0.5 s before a retransmission gives up.
export NCCL_IB_TIMEOUT="${NCCL_IB_TIMEOUT:-19}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
export TOKENIZERS_PARALLELISM="${TOKENIZERS_PARALLELISM:-false}"
export PYTHONUNBUFFERED=1

LAUNCH_VARIABLES=(CUDA_DEVICE_MAX_CONNECTIONS PYTORCH_CUDA_ALLOC_CONF TORCH_NCCL_ASYNC_ERROR_HANDLING
    TORCH_NCCL_AVOID_RECORD_STREAMS NCCL_NVLS_ENABLE NCCL_IB_TIMEOUT OMP_NUM_THREADS TOKENIZERS_PARALLELISM
    PYTHONUNBUFFERED)

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
