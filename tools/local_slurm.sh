#!/usr/bin/env bash
# A real Slurm on this machine's loopback, for tests: munged, slurmctld and two slurmd (node1, node2), all of them as the
# user who starts them. On Debian or Ubuntu.
#
#   tools/local_slurm.sh install          # slurm-wlm, munge, shellcheck, g++ by apt-get, as root or with sudo
#   tools/local_slurm.sh start DIR        # everything it writes lies in DIR; then: export SLURM_CONF=DIR/slurm.conf
#   tools/local_slurm.sh stop DIR
#
# Jobs find each other at 127.0.0.1: sbatch --export=ALL,MASTER_ADDR=127.0.0.1 --gpus-per-node=0 --nodes=2 ...
set -euo pipefail
export PATH="$PATH:/usr/sbin:/sbin"

install() {
    local program missing=false
    for program in slurmctld munged shellcheck g++; do
        command -v "$program" >/dev/null || missing=true
    done
    if ! $missing; then
        return
    fi
    local sudo=()
    if [[ $(id -u) != 0 ]] && sudo -n true 2>/dev/null; then
        sudo=(sudo -n)
    elif [[ $(id -u) != 0 ]] || ! command -v apt-get >/dev/null; then
        echo "SLURM OR G++ IS NOT INSTALLED, and only root (or sudo) with apt-get can: tests that need it are left out" >&2
        return
    fi
    "${sudo[@]}" env DEBIAN_FRONTEND=noninteractive bash "$0" packages
}

packages() {
    # A policy that forbids it: the packages' own services are not wanted, and containers have no systemd.
    local policy=/usr/sbin/policy-rc.d made=false
    if [[ ! -e $policy ]]; then
        printf '#!/bin/sh\nexit 101\n' >"$policy" && chmod +x "$policy" && made=true
    fi
    local names=(slurm-wlm munge shellcheck g++)
    apt-get update -qq -o Acquire::Retries=5 >/dev/null &&
        apt-get install -y -qq -o Acquire::Retries=5 --no-install-recommends "${names[@]}" >/dev/null 2>&1 ||
        echo "APT-GET COULD NOT INSTALL ${names[*]}: tests that need them are left out" >&2
    if $made; then
        rm -f "$policy"
    fi
}

configuration() {
    local directory=$1 port=$2 host user
    host=$(hostname) user=$(id -un)
    cat <<END
ClusterName=local
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$port
SlurmUser=$user
SlurmdUser=$user
AuthType=auth/munge
# cred_expire: a requeued job waits that long before it starts again (2 minutes by default).
AuthInfo=socket=$directory/munge.socket,cred_expire=5
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
StateSaveLocation=$directory/state
SlurmdSpoolDir=$directory/spool.%n
SlurmctldPidFile=$directory/slurmctld.pid
SlurmdPidFile=$directory/slurmd.%n.pid
SlurmctldLogFile=$directory/slurmctld.log
SlurmdLogFile=$directory/slurmd.%n.log
SlurmctldTimeout=300
SlurmdTimeout=300
SchedulerParameters=sched_interval=5,batch_sched_delay=1
SlurmdParameters=config_overrides
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
# Between SIGTERM and SIGKILL; 30 s by default, which a machine that is busy otherwise may need for a small model.
KillWait=600
NodeName=node1 NodeHostname=$host NodeAddr=127.0.0.1 Port=$((port + 1)) CPUs=2
NodeName=node2 NodeHostname=$host NodeAddr=127.0.0.1 Port=$((port + 2)) CPUs=2
PartitionName=local Nodes=node1,node2 Default=YES MaxTime=INFINITE State=UP
END
}

start() {
    local directory=$1
    mkdir -p "$directory/state" "$directory/spool.node1" "$directory/spool.node2"
    chmod 755 "$directory"
    dd if=/dev/urandom of="$directory/munge.key" bs=1024 count=1 status=none
    chmod 400 "$directory/munge.key"
    munged --force --key-file="$directory/munge.key" --socket="$directory/munge.socket" \
        --pid-file="$directory/munged.pid" --log-file="$directory/munged.log" --seed-file="$directory/munge.seed" \
        --origin=127.0.0.1 2>"$directory/munged.err" || { cat "$directory/munged.err" >&2 && return 1; }
    export SLURM_CONF=$directory/slurm.conf
    for _ in {1..5}; do # another process may take a port between the look and the use: then other ports
        configuration "$directory" "$(free_ports)" >"$SLURM_CONF"
        if start_daemons "$directory"; then
            return
        elif ! grep -q 'Address already in use' "$directory"/slurm*.log; then
            break
        fi
        stop_daemons "$directory"/slurmd.*.pid "$directory/slurmctld.pid"
        rm -f "$directory"/slurm*.log "$directory"/slurm*.pid
    done
    echo "no two idle nodes after 30 s; see the logs in $directory" >&2
    return 1
}

# The first of three neighbouring ports at which nothing answers, below those that Linux gives to outgoing connections.
free_ports() {
    local port offset answered
    while true; do
        port=$((20000 + RANDOM % 12000)) answered=false
        for offset in 0 1 2; do
            if (: <>"/dev/tcp/127.0.0.1/$((port + offset))") 2>/dev/null; then
                answered=true
            fi
        done
        $answered || break
    done
    echo "$port"
}

# Returns 1 where a daemon could not take its port, at once, or where no two nodes are idle after 30 s.
start_daemons() {
    local directory=$1
    slurmctld -c -f "$SLURM_CONF"
    slurmd -N node1 -f "$SLURM_CONF"
    slurmd -N node2 -f "$SLURM_CONF"
    for _ in {1..60}; do
        if [[ $(timeout 5 sinfo -h -N -t idle -o %N 2>/dev/null | wc -l) == 2 ]]; then
            return 0
        elif grep -q 'Address already in use' "$directory"/slurm*.log; then
            return 1
        fi
        sleep 0.5
    done
    return 1
}

stop() {
    local directory=$1
    export SLURM_CONF=$directory/slurm.conf
    scancel --user="$(id -un)" --signal=KILL --full 2>/dev/null || true
    scancel --user="$(id -un)" 2>/dev/null || true
    for _ in {1..40}; do # a slurmd waits for its steps, and they for it
        if [[ -z $(squeue -h 2>/dev/null) ]]; then
            break
        fi
        sleep 0.5
    done
    stop_daemons "$directory"/slurmd.*.pid "$directory/slurmctld.pid" "$directory/munged.pid"
}

# Ends the processes whose process ids stand in the given files, by SIGKILL where SIGTERM does not within 5 s.
stop_daemons() {
    local file pids=()
    for file in "$@"; do
        if [[ -s $file ]]; then
            pids+=("$(cat "$file")")
        fi
    done
    if [[ ${#pids[@]} == 0 ]]; then
        return 0
    fi
    kill "${pids[@]}" 2>/dev/null || true
    for _ in {1..20}; do
        kill -0 "${pids[@]}" 2>/dev/null || return 0
        sleep 0.25
    done
    kill -KILL "${pids[@]}" 2>/dev/null || true
}

case ${1:-} in
    install) install ;;
    packages) packages ;;
    start) start "$(realpath -m "${2:?DIR is missing}")" ;;
    stop) stop "$(realpath -m "${2:?DIR is missing}")" ;;
    *) sed -n '2,/^set/p' "$0" | sed '$d; s/^# \{0,1\}//' >&2 && exit 2 ;;
esac
