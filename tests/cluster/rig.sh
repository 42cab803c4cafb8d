#!/bin/bash
# Hosts h1 … hN on one machine: each has its own processes, network card, hostname, /run, /dev/shm, sshd, munged and
# slurmd; h1 has slurmctld as well. Other files are the machine's, as on a disk that all hosts share, but for /mnt and
# the configuration that is mounted here.
#
#     rig.sh HOSTS    in new namespaces (rig.py starts it); says "ready PID PID …", a host's first process each
#
# All of it lies in namespaces whose first process is this script: when that dies, for whatever reason, the kernel ends
# every process, card and mount of the rig. Nothing is written to the machine's disk, nothing is added to its network.
set -euo pipefail
NETWORK=10.77.0
STATE=/mnt/rig

configure() {
    local hosts=$1 i
    mount -t tmpfs -o mode=755 rig /mnt
    mkdir -p "$STATE"/{slurm,ssh_config.d,log,spool}
    { echo "127.0.0.1 localhost"; for i in $(seq "$hosts"); do echo "$NETWORK.$i h$i"; done; } > "$STATE/hosts"
    mount --bind "$STATE/hosts" /etc/hosts
    ssh-keygen -q -t ed25519 -N '' -f "$STATE/key"
    ssh-keygen -q -t ed25519 -N '' -f "$STATE/host_key"
    cat > "$STATE/ssh_config.d/rig.conf" <<CONF
Host h* $NETWORK.*
    IdentityFile $STATE/key
    StrictHostKeyChecking no
    UserKnownHostsFile /dev/null
    LogLevel ERROR
CONF
    mount --bind "$STATE/ssh_config.d" /etc/ssh/ssh_config.d
    cat > "$STATE/sshd_config" <<CONF
HostKey $STATE/host_key
AuthorizedKeysFile $STATE/key.pub
PermitRootLogin prohibit-password
PasswordAuthentication no
UsePAM no
StrictModes no
CONF
    (umask 077; head -c 128 /dev/urandom > "$STATE/munge.key")
    mkdir -p /etc/slurm
    mount --bind "$STATE/slurm" /etc/slurm
    echo "CgroupPlugin=cgroup/v1" > /etc/slurm/cgroup.conf
    # Slurm hands these devices out as GPUs; no driver is behind them.
    for i in {0..3}; do mknod "$STATE/gpu$i" c 240 "$i"; done
    echo "NodeName=h[1-$hosts] Name=gpu Type=h100 File=$STATE/gpu[0-3]" > /etc/slurm/gres.conf
    # CPUs that the machine may not have: a task of a test needs its slot, not a core of its own.
    cat > /etc/slurm/slurm.conf <<CONF
ClusterName=rig
SlurmctldHost=h1
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
SlurmctldPidFile=/run/slurmctld.pid
SlurmdPidFile=/run/slurmd.pid
SlurmctldLogFile=$STATE/log/slurmctld.log
SlurmdLogFile=$STATE/log/slurmd.%n.log
SlurmdSpoolDir=$STATE/spool/%n
StateSaveLocation=$STATE/spool/slurmctld
SlurmdParameters=config_overrides
MpiDefault=none
SwitchType=switch/none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_min_interval=0,batch_sched_delay=0
ReturnToService=2
SlurmdTimeout=20
KillWait=10
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PropagateResourceLimits=NONE
GresTypes=gpu
NodeName=h[1-$hosts] CPUs=4 RealMemory=1000 Gres=gpu:h100:4 State=UNKNOWN
PartitionName=main Nodes=h[1-$hosts] Default=YES PriorityTier=1 GraceTime=20 MaxTime=60 State=UP
PartitionName=abrupt Nodes=h[1-$hosts] PriorityTier=1 MaxTime=60 State=UP
PartitionName=urgent Nodes=h[1-$hosts] PriorityTier=9 MaxTime=60 State=UP
CONF
}

# The first process of host $1: brings its services up, then reaps what is left to it.
host() {
    local i=$1
    hostname "h$i"
    mount -t tmpfs tmpfs /run
    mount -t tmpfs -o size=1g tmpfs /dev/shm
    mkdir -p /run/sshd /run/munge "$STATE/spool/h$i"
    until ip link show eth0 > /dev/null 2>&1; do sleep 0.02; done
    ip link set lo up
    ip address add "$NETWORK.$i/24" dev eth0
    ip link set eth0 up
    /usr/sbin/sshd -f "$STATE/sshd_config" -E "$STATE/log/sshd.h$i.log"
    munged --force --key-file="$STATE/munge.key" --log-file="$STATE/log/munged.h$i.log" \
        --seed-file="/run/munge/seed" --pid-file="/run/munge/pid"
    if [ "$i" = 1 ]; then slurmctld; fi
    slurmd
    touch "$STATE/up.$i"
    while :; do sleep 3600 & wait $!; done
}

# How many nodes Slurm would give work to, asked on the host whose first process is $1.
idle() { nsenter -t "$1" -a sinfo -hN -p main -o %T 2> /dev/null | grep -c '^idle$' || true; }

rig() {
    local hosts=$1 i outer inner first=()
    configure "$hosts"
    ip link set lo up
    ip link add switch type bridge
    ip link set switch up
    for i in $(seq "$hosts"); do
        unshare --pid --fork --kill-child --mount-proc --mount --net --uts --ipc \
            "$0" host "$i" > "$STATE/log/host.h$i.log" 2>&1 &
        outer=$!
        inner=
        # The list of children ends without a newline, which read takes for a failure.
        until [ -n "$inner" ]; do sleep 0.02; read -r inner _ < "/proc/$outer/task/$outer/children" || true; done
        first+=("$inner")
        ip link add "port$i" type veth peer name eth0 netns "$inner"
        ip link set "port$i" master switch up
    done
    for i in $(seq "$hosts"); do
        until [ -e "$STATE/up.$i" ]; do
            kill -0 "${first[i - 1]}" || { cat "$STATE"/log/host.*.log >&2; exit 1; }
            sleep 0.02
        done
    done
    until [ "$(idle "${first[0]}")" = "$hosts" ]; do sleep 0.1; done
    echo "ready ${first[*]}"
    while :; do sleep 3600 & wait $!; done
}

case ${1:-} in
    host) host "$2" ;;
    [1-9]*) rig "$1" ;;
    *) sed -n '2,/^[^#]/s/^# \?//p' "$0"; exit 2 ;;
esac
