#!/usr/bin/env bash
# Installs ldm_jax on every worker of a TPU VM that is there, and trains on all of them.
set -euo pipefail

usage() {
  cat >&2 <<'USAGE'
usage: launch/tpu_pod.sh NAME ZONE WORKDIR CONFIG [--config.FIELD=VALUE …]

  NAME, ZONE  an existing TPU VM
  WORKDIR     a folder that every worker sees under this path
  CONFIG      configs/FILE.py[:PRESET], as for python -m ldm_jax.train

environment:
  LDM_JAX_SOURCE  where the workers clone from (default: this clone's origin)
  LDM_JAX_REF     branch, tag or commit (default: main)
  LDM_JAX_LOG     the merged log on this machine (default: NAME.log)

Creates and deletes nothing in the cloud. Run it again to resume.
USAGE
  exit 2
}
[[ $# -ge 4 && $1 != -* ]] || usage

name=$1 zone=$2
shift 2
workdir=$1 config=$2
shift 2
here=$(cd "$(dirname "$0")/.." && pwd)
ref=${LDM_JAX_REF:-main}
log=${LDM_JAX_LOG:-$name.log}
source=${LDM_JAX_SOURCE:-$(git -C "$here" remote get-url origin)} || {
  echo "error: LDM_JAX_SOURCE is not set and this clone has no origin; set it" >&2
  exit 2
}

# The workers find their number by themselves; this tells them that they are several.
coordinator=$(gcloud compute tpus tpu-vm describe "$name" --zone="$zone" \
  --format='value(networkEndpoints[0].ipAddress)')
[[ -n $coordinator ]] || {
  echo "error: $name in $zone has no worker with an address; is it ready?" >&2
  exit 2
}

# printf %q keeps every argument one word through ssh and the remote shell.
train=$(printf '%q ' python3 -u -m ldm_jax.train "--config=$config" \
  "--workdir=$workdir" "$@")
remote=$(cat <<REMOTE
set -euo pipefail
test -d ldm_jax_src || git clone -q $(printf %q "$source") ldm_jax_src
cd ldm_jax_src
git fetch -q origin $(printf %q "$ref") && git checkout -q --detach FETCH_HEAD
test -d ../ldm_jax_venv || python3 -m venv ../ldm_jax_venv
source ../ldm_jax_venv/bin/activate
pip install -q -e '.[train,tpu]'
export JAX_COORDINATOR_ADDRESS=$coordinator:8476
$train 2>&1 | sed -u "s/^/[\$(hostname)] /"
REMOTE
)

echo "training on all workers of $name; log in $log"
gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all \
  --command="bash -c $(printf %q "$remote")" 2>&1 | tee -a "$log"
