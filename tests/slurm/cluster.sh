#!/bin/bash
# A Slurm cluster of two nodes on this one machine, for tests: cluster.sh start|stop FOLDER
#
# As root, with Debian's slurmctld, slurmd and munge. Everything it writes is below FOLDER; the
# daemons listen on ports of their own, so an installed cluster is not touched. Clients find it by
# SLURM_CONF=FOLDER/slurm.conf. Partition "low" is preempted by "high" and requeues.
set -eu
action=$1
here=$(realpath -m "$2")

for program in slurmctld slurmd munged mungekey sbatch; do
    command -v "$program" >/dev/null || {
        echo "error: no $program: apt-get install slurmctld slurmd slurm-client munge" >&2
        exit 2
    }
done

stop() {
    for name in slurmd.n1 slurmd.n2 slurmctld munged; do
        if [ -s "$here/$name.pid" ]; then
            kill "$(cat "$here/$name.pid")" 2>/dev/null || true
        fi
    done
}

start() {
    mkdir -p "$here"/{state,spool.n1,spool.n2,munge,log}
    chmod 700 "$here/munge"
    [ -s "$here/munge/munge.key" ] || mungekey --create --keyfile "$here/munge/munge.key"
    # munged runs as root here, in a folder that is not the system's: --force takes that.
    munged --force --socket "$here/munge.socket" --key-file "$here/munge/munge.key" \
        --pid-file "$here/munged.pid" --log-file "$here/log/munged.log" \
        --seed-file "$here/munge/seed" --num-threads 2
    host=$(hostname -s)
    cat >"$here/slurm.conf" <<EOF
ClusterName=test
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=16817
AuthType=auth/munge
AuthInfo=socket=$here/munge.socket
CryptoType=crypto/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation=$here/state
SlurmctldPidFile=$here/slurmctld.pid
SlurmctldLogFile=$here/log/slurmctld.log
SlurmdSpoolDir=$here/spool.%n
SlurmdPidFile=$here/slurmd.%n.pid
SlurmdLogFile=$here/log/slurmd.%n.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
# Without cgroups to write to: memory is watched, and a job over it is killed.
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=1
JobAcctGatherParams=OverMemoryKill,NoShared
AccountingStorageType=accounting_storage/none
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
KillWait=10
ReturnToService=2
SlurmdTimeout=60
InactiveLimit=0
MinJobAge=600
SchedulerParameters=sched_interval=2,bf_interval=2,requeue_delay=1
NodeName=n1 NodeHostname=$host NodeAddr=127.0.0.1 Port=17001 CPUs=2 RealMemory=8000
NodeName=n2 NodeHostname=$host NodeAddr=127.0.0.1 Port=17002 CPUs=2 RealMemory=8000
PartitionName=low Nodes=n1,n2 Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=10 MaxTime=60
PartitionName=high Nodes=n1,n2 PriorityTier=2 PreemptMode=OFF MaxTime=60
EOF
    export SLURM_CONF=$here/slurm.conf
    slurmctld -c -i
    slurmd -N n1
    slurmd -N n2
    for _ in $(seq 240); do
        [ "$(sinfo --noheader --Node --states=idle --partition=low 2>/dev/null | wc -l)" = 2 ] && return
        sleep 0.5
    done
    echo "error: the nodes did not come up; see $here/log" >&2
    exit 1
}

"$action"
