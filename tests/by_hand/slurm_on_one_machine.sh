#!/usr/bin/env bash
# Runs cluster/slurm/train.sbatch on a real Slurm of two nodes on this machine: a run that is sent back to the queue
# in the middle, and one whose node fails; both must end with the weights of an undisturbed one, bit for bit.
#
#   apt-get install -y slurm-wlm munge iproute2        (Debian, Ubuntu; root)
#   tests/by_hand/slurm_on_one_machine.sh              (in the repository, with its environment in .venv)
#
# A node is a slurmd with a network, host name and processes of its own. Nothing of this machine's own Slurm is
# touched. It takes about ten minutes.
set -euo pipefail
cd "$(dirname "$0")/../.."

work=$(mktemp -d /tmp/rtslurm.XXXXXX)
bridge=rtsl0
subnet=10.78.0
nodes=(n1 n2)
export SLURM_CONF=$work/slurm.conf VENV=${VENV:-$PWD/.venv}
declare -A slurmd=()

clean_up() {
  set +e
  for node in "${nodes[@]}"; do stop_node "$node"; done
  [[ -s $work/slurmctld.pid ]] && kill "$(<"$work/slurmctld.pid")"
  [[ -s $work/munged.pid ]] && kill "$(<"$work/munged.pid")"
  for node in "${nodes[@]}"; do ip netns del "rt$node"; done
  ip link del "$bridge"
  sleep 1
  [[ -n ${KEEP:-} ]] || rm -rf "$work"
} 2>/dev/null
trap clean_up EXIT

network() {
  ip link add "$bridge" type bridge
  ip addr add "$subnet.254/24" dev "$bridge"
  ip link set "$bridge" up
  echo "127.0.0.1 localhost" >"$work/hosts"
  for index in "${!nodes[@]}"; do
    local node=${nodes[index]} address=$subnet.$((index + 1))
    echo "$address $node" >>"$work/hosts"
    ip netns add "rt$node"
    ip link add "rt$node" type veth peer name eth0 netns "rt$node"
    ip link set "rt$node" master "$bridge" up
    ip -n "rt$node" addr add "$address/24" dev eth0
    ip -n "rt$node" link set eth0 up
    ip -n "rt$node" link set lo up
  done
}

configuration() {
  cat >"$SLURM_CONF" <<END
ClusterName=rt
SlurmctldHost=$(hostname -s)($subnet.254)
SlurmctldPort=16817
SlurmdPort=16818
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$work/munge.socket,cred_expire=20
CryptoType=crypto/munge
StateSaveLocation=$work/state
SlurmdSpoolDir=$work/spool.%n
SlurmctldPidFile=$work/slurmctld.pid
SlurmdPidFile=$work/slurmd.%n.pid
SlurmctldLogFile=$work/slurmctld.log
SlurmdLogFile=$work/slurmd.%n.log
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=2,bf_interval=2
SlurmdTimeout=10
MinJobAge=3600
ReturnToService=2
NodeName=n1 NodeAddr=$subnet.1 CPUs=4
NodeName=n2 NodeAddr=$subnet.2 CPUs=4
PartitionName=all Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
END
  mkdir -p "$work/state" "$work/spool.n1" "$work/spool.n2" "$work/log"
}

start_node() { # its processes are its own, so that `ray stop` at the end of a job ends no other Ray
  # shellcheck disable=SC2016 # expanded inside
  nsenter --net="/run/netns/rt$1" unshare --uts --mount --pid --fork --kill-child --mount-proc bash -c '
    hostname "$1"
    mount --bind "$2/hosts" /etc/hosts
    mkdir -p /tmp/ray && mount -t tmpfs tmpfs /tmp/ray
    slurmd -D -N "$1" &
    wait' node "$1" "$work" >>"$work/node.$1.log" 2>&1 &
  slurmd[$1]=$!
}

stop_node() { # as a machine that loses its power
  [[ -n ${slurmd[$1]:-} ]] || return 0
  kill -KILL "${slurmd[$1]}" 2>/dev/null || true
  wait "${slurmd[$1]}" 2>/dev/null || true
  unset "slurmd[$1]"
}

until_true() { # SECONDS WHAT COMMAND...
  local end=$((SECONDS + $1)) what=$2
  shift 2
  until "$@"; do
    if ((SECONDS > end)); then
      echo "waited in vain for $what" >&2
      squeue >&2
      tail -n 40 "$work"/log/*.log >&2
      return 1
    fi
    sleep 0.5
  done
}

state_of() { scontrol show job "$1" | sed -n 's/.*JobState=\([A-Z_]*\).*/\1/p'; }
is_in_state() { [[ $(state_of "$1") == "$2" ]]; }
all_idle() { [[ $(sinfo -h -o '%D %t') == "2 idle" ]]; }
reached() { [[ $(tail -n 1 "$work/runs/$1/metrics.jsonl" 2>/dev/null) =~ \"step\":\ ?([0-9]+) ]] && ((BASH_REMATCH[1] >= $2)); }
submit() {
  sbatch --parsable --time=30 --output="$work/log/$1.log" --export=ALL cluster/slurm/train.sbatch examples/digits.yaml \
    "cluster.storage_path=$work/runs" "cluster.name=$1" cluster.placement_strategy=SPREAD training.epochs=40 \
    training.log_every_n_steps=1 training.tensorboard=false
}
started() { # how often the workers of a run were started
  grep -c '"event": *"workers_started"' "$work/runs/$1/events.jsonl"
}

network
configuration
munged --key-file=/etc/munge/munge.key --socket="$work/munge.socket" --pid-file="$work/munged.pid" \
  --log-file="$work/munged.log" --seed-file="$work/munged.seed" --force 2>"$work/munged.err"
slurmctld -c 2>"$work/slurmctld.err"
for node in "${nodes[@]}"; do start_node "$node"; done
until_true 60 "two idle nodes" all_idle
sinfo

echo "== an undisturbed run"
job=$(submit whole)
until_true 400 "the end of job $job" is_in_state "$job" COMPLETED

echo "== a run that is sent back to the queue, as five minutes before its time limit"
job=$(submit requeued)
until_true 300 "step 100" reached requeued 100
scancel --batch --signal=USR1 "$job"
until_true 180 "job $job in the queue" is_in_state "$job" PENDING # for as long as cred_expire says
until_true 400 "the end of job $job" is_in_state "$job" COMPLETED
echo "the workers were started $(started requeued) times"

echo "== a run whose second node fails"
job=$(submit failed)
until_true 300 "step 100" reached failed 100
stop_node n2
until_true 180 "job $job in the queue" is_in_state "$job" PENDING # for as long as cred_expire says
start_node n2
until_true 60 "two idle nodes" all_idle
until_true 400 "the end of job $job" is_in_state "$job" COMPLETED
echo "the workers were started $(started failed) times"

for run in whole requeued failed; do
  "$VENV/bin/ray-trainer" export "$work/runs/$run" --newest --output "$work/$run.safetensors" >/dev/null
done
cmp "$work/whole.safetensors" "$work/requeued.safetensors"
cmp "$work/whole.safetensors" "$work/failed.safetensors"
[[ $(started requeued) -ge 2 && $(started failed) -ge 2 ]]
echo "the same weights, bit for bit"
