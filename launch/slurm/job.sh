# Sourced by the .sbatch files: the steps of a job, from its checks to its end. It uses srun, one task per GPU, which
# reads rank and world size from SLURM_*; torchrun would kill the ranks 30 seconds after Slurm's SIGTERM.
# shellcheck shell=bash
if [[ ${BASH_SOURCE[0]} == "$0" ]]; then
    sed -n '/^# shellcheck/q;/^#/!q;s/^# \{0,1\}//p' "$0"
    [[ ${1:-} == --help || ${1:-} == -h ]] && exit 0
    echo "$0: submit one of the .sbatch files beside it instead" >&2
    exit 2
fi

# shellcheck source=launch/environment.sh
source "$HOME_OF_REPOSITORY/launch/environment.sh"
# shellcheck source=launch/functions.sh
source "$HOME_OF_REPOSITORY/launch/functions.sh"

# Settings of the job; give them before `sbatch`, e.g. RUN_DIR=runs/a CONTAINER_IMAGE=nvcr.io#nvidia/pytorch:25.10-py3
PYTHON=${PYTHON:-python}
RUN_DIR=${RUN_DIR:-runs/${SLURM_JOB_NAME:-megatron-embed}} # checkpoints, metrics, DONE
CONTAINER_IMAGE=${CONTAINER_IMAGE:-}                         # pyxis/enroot; empty: bare nodes
CONTAINER_MOUNTS=${CONTAINER_MOUNTS:-$PWD:$PWD}
SUBDIRECTORY=''                   # set by the array files: the folder of one of their runs
MAX_RESTARTS=${MAX_RESTARTS:-100} # largest number of requeues of a job
PREFLIGHT=${PREFLIGHT:-yes}       # no: the job does not check first whether the run can start
MIN_FREE_GIB=${MIN_FREE_GIB:-1}   # required on the disks of the outputs, however little the run writes

# run_job [--dry-run] CONFIG.yaml [section.key=value ...]: runs the job and returns its exit code.
run_job() {
    local dry_run=false
    if [[ ${1:-} == --help || ${1:-} == -h ]]; then
        print_help "$0"
        return 0
    fi
    if [[ ${1:-} == --dry-run ]]; then
        dry_run=true
        shift
        SLURM_NTASKS=${SLURM_NTASKS:-$(sed -n 's/^#SBATCH --ntasks-per-node=//p' "$0")}
    fi
    if (($# == 0)) || [[ -z $1 ]]; then
        echo "CONFIG.yaml is missing: sbatch $0 CONFIG.yaml [section.key=value ...]" >&2
        return 2
    fi
    if [[ $1 == -* ]]; then
        echo "$0: unknown option $1; options of sbatch go before the script's name, and the script has --dry-run" \
            "and --help" >&2
        return 2
    fi
    if ((${SLURM_HET_SIZE:-1} > 1)); then
        echo "SLURM_HET_SIZE = $SLURM_HET_SIZE: a heterogeneous job, whose components srun would start separately;" \
            "submit one job of equal components (its nodes may differ in their number of tasks)" >&2
        return 2
    fi
    # Slurm's signals are for the ranks, which save and end. The script and srun must outlive them: the SIGTERM of a
    # requeue reaches them as well, and an srun that handles it kills its tasks.
    signalled=false
    trap 'signalled=true' TERM USR1
    # Runs that share a configuration need their own folder in every output directory: two that write one export or one
    # log would end each other.
    local where=("checkpoint.directory=$RUN_DIR")
    if [[ -n $SUBDIRECTORY ]]; then
        where+=(--subdirectory "$SUBDIRECTORY")
        RUN_DIR=$RUN_DIR/$SUBDIRECTORY
    fi
    # The address is the first node. Jobs that share a node need different ports, and so do seven starts of a job: a
    # rank 0 of an earlier start that does not end would hold it. Below 32768, where Linux begins with ports of
    # connections.
    if [[ -z ${MASTER_ADDR:-} && -n ${SLURM_JOB_NODELIST:-} ]]; then
        read -r MASTER_ADDR < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
    fi
    local start=$((${SLURM_JOB_ID:-0} * 7 + ${SLURM_RESTART_COUNT:-0} % 7))
    export MASTER_ADDR=${MASTER_ADDR:-FIRST_NODE} MASTER_PORT=${MASTER_PORT:-$((20000 + start % 12750))}
    LAUNCH_VARIABLES+=(MASTER_ADDR MASTER_PORT)
    local container=()
    if [[ -n $CONTAINER_IMAGE ]]; then
        container=(--container-image "$CONTAINER_IMAGE" --container-mounts "$CONTAINER_MOUNTS" --container-workdir "$PWD"
            --no-container-mount-home)
    fi
    local once_per_node=(srun --ntasks-per-node=1 --ntasks="${SLURM_NNODES:-1}" "${container[@]}")
    local check=("${once_per_node[@]}" "$PYTHON" -m megatron_embed doctor --config "$1" --ranks "${SLURM_NTASKS:-1}"
        --ranks-per-node "$(ranks_per_node)" --min-free-gib "$MIN_FREE_GIB"
        "${where[@]}" "${@:2}")
    # --kill-on-bad-exit=0: ranks that have saved end one after the other with 75, and the first must not kill the
    # others. A rank that crashes still ends the others: they notice within parallel.timeout_seconds.
    local train=(srun --kill-on-bad-exit=0 "${container[@]}" "$PYTHON" -m megatron_embed train "$1"
        "${where[@]}" "${@:2}")
    if $dry_run; then
        grep '^#SBATCH' "$0"
        print_environment
        [[ -n $SUBDIRECTORY ]] && echo "# outputs: a folder $SUBDIRECTORY in each of checkpoint.directory," \
            "logging.directory and checkpoint.export_at_end that the configuration sets"
        [[ $PREFLIGHT != no ]] && print_command "${check[@]}"
        print_command "${train[@]}"
        return 0
    fi
    # The default of RUN_DIR is the job's name, which two configurations may share.
    local config owner=$RUN_DIR/.launched_config
    config=$(realpath -m "$1")
    if [[ -e $owner && $(<"$owner") != "$config" ]]; then
        echo "RUN_DIR = $RUN_DIR is the directory of $(<"$owner"), not of $config: set RUN_DIR, or give the job a name" \
            "of its own (--job-name); if the file has only moved, remove $owner" >&2
        return 2
    fi
    if [[ -e $RUN_DIR/DONE ]]; then
        echo "$RUN_DIR/DONE exists: the run is complete; remove it to train more steps"
        return 0
    fi
    echo "job $SLURM_JOB_ID on $SLURM_JOB_NODELIST, start number $((${SLURM_RESTART_COUNT:-0} + 1)), $(date --iso-8601=seconds)"
    if [[ $PREFLIGHT != no ]]; then
        run_undisturbed "${check[@]}"
        if $signalled; then
            finish 75
            return
        fi
        ((code == 0)) || return "$code"
    fi
    # A new secret for each start, so that messages from before a requeue do not count.
    export MEGATRON_EMBED_SECRET=${MEGATRON_EMBED_SECRET:-$(new_secret)}
    mkdir -p "$RUN_DIR"
    echo "$config" >"$owner"
    export MEGATRON_EMBED_STATUS_FILE=$RUN_DIR/.status
    rm -f "$MEGATRON_EMBED_STATUS_FILE"
    run_undisturbed "${train[@]}"
    # An srun that gave up waiting for a step that Slurm killed returns 0: a run is complete only if the ranks report
    # it.
    if ((code == 0)) && ! grep -qs '"exit_code": 0' "$MEGATRON_EMBED_STATUS_FILE"; then
        echo "srun ended with 0, but the ranks did not report success" >&2
        code=1
        killed=true
    fi
    finish "$code"
}

# Runs a command that Slurm's signals do not reach, and waits for its end however many arrive. Sets $code to its exit
# code and $killed to whether a signal ended it.
run_undisturbed() {
    (trap '' TERM USR1 && exec "$@") &
    code=0
    await "$!" || code=$?
    killed=$( ((code > 128 && code < 160)) && echo true || echo false)
}

# Prints the number of ranks per node: one number, or Slurm's list, 8(x2),4, if they differ.
ranks_per_node() {
    local list=${SLURM_TASKS_PER_NODE:-}
    if [[ -z $list ]]; then
        echo "$((${SLURM_NTASKS:-1} / ${SLURM_NNODES:-1}))"
    elif [[ $list =~ ^([0-9]+)(\(x[0-9]+\))?$ ]]; then
        echo "${BASH_REMATCH[1]}"
    else
        echo "$list"
    fi
}

# Whether ranks that were killed can resume after a requeue: Slurm wanted the node back (this script got its signal, or
# Slurm reports it), and the kill came from Slurm too: a SIGTERM before Python handled signals, or a SIGKILL when there
# is a complete checkpoint. A run that ran out of memory is not requeued, because it would run out again.
was_preempted() {
    $killed || return 1
    $signalled || scontrol show job "$SLURM_JOB_ID" 2>/dev/null |
        grep -Eq 'JobState=PREEMPTED|PreemptTime=[0-9]' || return 1
    if (($1 == 143 || $1 == 138)); then
        return 0
    fi
    ! sacct -n -P -j "$SLURM_JOB_ID" -o State 2>/dev/null | grep -q OUT_OF_ME && [[ -s $RUN_DIR/latest ]]
}

# Ends or requeues the job, by the exit code of the ranks.
finish() {
    if (($1 != 75)) && was_preempted "$1"; then
        echo "the ranks were killed (exit code $1) because Slurm wants the node back" >&2
        finish 75
        return
    fi
    case $1 in
        0)
            date --iso-8601=seconds >"$RUN_DIR/DONE"
            echo "the run is complete"
            ;;
        75)
            if ((${SLURM_RESTART_COUNT:-0} >= MAX_RESTARTS)); then
                echo "saved, and not requeued again: MAX_RESTARTS = $MAX_RESTARTS" >&2
                return 75
            fi
            echo "saved; requeueing job $SLURM_JOB_ID"
            # Fails if Slurm is requeueing the job already.
            scontrol requeue "$SLURM_JOB_ID" || true
            return 75
            ;;
        *)
            echo "the run failed with exit code $1" >&2
            return "$1"
            ;;
    esac
}
