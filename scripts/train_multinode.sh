#!/usr/bin/env bash
# Trains on several machines: run it on each, with the same arguments and these variables.
#   NNODES=4 NODE_RANK=0 MASTER_ADDR=10.0.0.1 scripts/train_multinode.sh CONFIG [key.path=value ...]
# NNODES       machines                NODE_RANK      this one, 0 to NNODES-1
# MASTER_ADDR  machine 0's address     MASTER_PORT    a free port of machine 0 (29500)
# WAIT         seconds to wait for the others (600); those that did not come are named
# GPUS_PER_NODE, PYTHON                as in train.sh; docs/launch.md
set -euo pipefail
# A signal before training begins: nothing is to be saved (exit status 75, as docs/launch.md says).
trap 'echo "s2megatron: stopped by a signal before training began (exit status 75)"; exit 75' TERM USR1
root=$(cd "$(dirname "$0")/.." && pwd)
for name in NNODES NODE_RANK MASTER_ADDR; do
    if [ -z "${!name:-}" ]; then
        echo "$name is not set:" >&2
        sed -n '2,7s/^# \{0,1\}//p' "$0" >&2
        exit 2
    fi
done
if [ $# -lt 1 ]; then
    sed -n '2,7s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
. "$root/scripts/common.sh"
find_training_python "$root"
config=$1
shift
exec "$python" -m s2megatron.agent --nnodes "$NNODES" --node-rank "$NODE_RANK" \
    --master-addr "$MASTER_ADDR" --master-port "${MASTER_PORT:-29500}" --wait "${WAIT:-600}" \
    --nproc-per-node "${GPUS_PER_NODE:-0}" -- --config "$config" "$@"
