#!/usr/bin/env bash
# From nothing to a trained model: dataset from Python's own source, 200 steps of a small hybrid S2
# model under torchrun (TP=2 + SP; GPUs if there are any, else CPU and gloo), evaluation on held-out
# files, a checkpoint, and 20 more steps resumed from it; then the model as a Hugging Face folder, and
# a few lines that it writes. Run it again at once: it picks up what is there.
#   scripts/quickstart.sh [STEPS [FOLDER]]     (200, runs/quickstart)
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/common.sh
make_venv ""

steps=${1:-200} run=${2:-runs/quickstart}
mkdir -p "$run/data"

if [ ! -e "$run/data/train.idx" ] || [ ! -e "$run/data/valid.idx" ]; then
    echo "== dataset: the Python standard library's source as bytes; every 10th file is held out"
    stdlib=$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_paths()["stdlib"])')
    find "$stdlib" -maxdepth 1 -name '*.py' | LC_ALL=C sort >"$run/data/files.txt"
    awk 'NR % 10 == 0' "$run/data/files.txt" | tr '\n' '\0' |
        xargs -0 .venv/bin/s2megatron data --out "$run/data/valid"
    awk 'NR % 10 != 0' "$run/data/files.txt" | tr '\n' '\0' |
        xargs -0 .venv/bin/s2megatron data --out "$run/data/train"
fi

gpus=$(.venv/bin/python -c 'import torch; print(torch.cuda.device_count())')
ranks=2 layout="megatron.tensor_model_parallel_size=2"
if [ "$gpus" -ge 1 ]; then
    layout="$layout megatron.bf16=true"
    if [ "$gpus" -eq 1 ]; then
        ranks=1 layout="megatron.tensor_model_parallel_size=1 megatron.sequence_parallel=false megatron.bf16=true"
    fi
fi

reached() { cat "$run/checkpoints/latest_checkpointed_iteration.txt" 2>/dev/null || echo 0; }

# train STEP OVERRIDES...: one launch; the whole log goes to a file, the lines worth reading here.
train() {
    echo "== $ranks rank(s), from iteration $(reached); the whole log: $run/train.log"
    .venv/bin/python -m torch.distributed.run --nproc-per-node "$ranks" \
        --rdzv-backend c10d --rdzv-endpoint 127.0.0.1:0 \
        -m s2megatron.pretrain --config configs/quickstart.yaml $layout \
        "data.train=[$run/data/train]" "data.valid=[$run/data/valid]" \
        "megatron.train_iters=$((steps + 20))" \
        megatron.save="$run/checkpoints" megatron.load="$run/checkpoints" \
        megatron.tensorboard_dir="$run/tensorboard" "$@" 2>&1 | tee -a "$run/train.log" |
        grep --line-buffered -E \
            '^(device|linear layers|norms|rotary|S2 attention|dense attention|optimizer|gradient fusion|layout|parameters|FLOPs per step|[0-9]+(-[0-9]+)? +(dense|local|ranges|sliding)|note:)|iteration +[0-9]+/|s2megatron|validation loss at|saved checkpoint|loaded checkpoint|Error|error:'
}

start=$SECONDS
[ "$(reached)" -ge "$steps" ] || train "megatron.exit_interval=$steps"
[ "$(reached)" -ge $((steps + 20)) ] || { echo "== resuming from the checkpoint for 20 more steps"; train; }
[ "$run/masks.png" -nt configs/quickstart.yaml ] ||
    .venv/bin/s2megatron show configs/quickstart.yaml --plot "$run/masks.png" --blocks 16 >"$run/layers.txt"
.venv/bin/python scripts/quality/quickstart_report.py "$run" "$steps" $((SECONDS - start))

model="$run/model-hf"
if [ ! "$model/config.json" -nt "$run/checkpoints/latest_checkpointed_iteration.txt" ]; then
    rm -rf "$model"
    .venv/bin/s2megatron convert to-hf "$run/checkpoints" --out "$model" 2>"$run/convert.log" ||
        { cat "$run/convert.log" >&2; exit 1; }
fi
printf 'import os\nimport sys\n\n\ndef main():\n    """' >"$run/prompt.txt"
echo "== what it writes after:"
cat "$run/prompt.txt"
# One thread: several lose more time by waiting for each other than a model of 1M parameters has work.
OMP_NUM_THREADS=1 .venv/bin/s2megatron generate "$model" --prompt-file "$run/prompt.txt" --max-new-tokens 300
