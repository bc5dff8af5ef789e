#!/usr/bin/env bash
# Trains on this machine: one rank per GPU, or one on the CPU.
#   scripts/train.sh CONFIG [key.path=value ...]
#   scripts/train.sh configs/llama_1.3b_32k.yaml output.folder=runs/first
# With output.folder the same command resumes what is there, and `kill -TERM PID` saves and stops
# (exit status 75: start again to go on). Settings: GPUS_PER_NODE (ranks), MASTER_PORT, PYTHON.
set -euo pipefail
# A signal before training begins: nothing is to be saved (exit status 75, as docs/launch.md says).
trap 'echo "s2megatron: stopped by a signal before training began (exit status 75)"; exit 75' TERM USR1
if [ $# -lt 1 ]; then
    sed -n '2,6s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
root=$(cd "$(dirname "$0")/.." && pwd)
. "$root/scripts/common.sh"
find_training_python "$root"
config=$1
shift
# exec: signals go to the agent itself.
exec "$python" -m s2megatron.agent --nproc-per-node "${GPUS_PER_NODE:-0}" \
    --master-port "${MASTER_PORT:-0}" -- --config "$config" "$@"
