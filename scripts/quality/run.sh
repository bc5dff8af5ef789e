#!/usr/bin/env bash
# The quality study from nothing to its report. Each step picks up what is there.
#   scripts/quality/run.sh [ARM[@RECIPE][#SEED] ...]       (all arms of scripts/quality/arms.py)
# Settings, with their defaults:
#   STUDY=runs/quality            everything is written here
#   PIECES=$STUDY/pieces          token pieces (corpus.py); made from TREE if missing
#   TREE=$STUDY/linux-source-6.1  a source tree; unpacked from Debian's linux-source-6.1 if missing
#   RECIPE=configs/quality/recipe.yaml
#   COPIES=$STUDY/results         a small JSON per arm, written anew whenever an arm gets further
#   GPUS_PER_ARM=1                arms run side by side, each on so many GPUs
#   PYTHON                        an interpreter that has everything; left out: .venv is made
set -euo pipefail
cd "$(dirname "$0")/../.."
. scripts/common.sh

study=${STUDY:-runs/quality}
pieces=${PIECES:-$study/pieces} tree=${TREE:-$study/linux-source-6.1}
recipe=${RECIPE:-configs/quality/recipe.yaml} copies=${COPIES:-$study/results}
mkdir -p "$study" "$copies"
if [ -z "${PYTHON:-}" ]; then
    make_venv ""
fi
find_training_python "$PWD"

if [ ! -e "$pieces/tokenizer" ]; then
    if [ ! -d "$tree" ]; then
        echo "== source: Debian's linux-source-6.1 (139 MB)"
        (cd "$study" && apt-get download linux-source-6.1)
        dpkg-deb --fsys-tarfile "$study"/linux-source-6.1_*.deb |
            tar xO ./usr/src/linux-source-6.1.tar.xz | tar xJ -C "$study"
    fi
    echo "== tokens: a document per directory, held-out subtrees, a BPE of 16,384 tokens"
    "$python" scripts/quality/corpus.py "$tree" "$pieces"
fi

arms=("$@")
if [ ${#arms[@]} -eq 0 ]; then
    mapfile -t arms < <("$python" scripts/quality/arms.py --names)
fi
recipes=(--recipe "$recipe")
for arm in "${arms[@]}"; do
    case $arm in
        *@*) own=${arm#*@}; recipes+=(--recipe "${own%%#*}") ;;
    esac
done
echo "== datasets: text, and retrieval documents for every phase"
"$python" scripts/quality/prepare.py "$pieces" "$study/data" "${recipes[@]}"

echo "== arms: ${arms[*]}"
status=0
"$python" scripts/quality/study.py --recipe "$recipe" --data "$study/data" --out "$study/arms" \
    --copies "$copies" --gpus-per-arm "${GPUS_PER_ARM:-1}" "${arms[@]}" || status=$?
"$python" scripts/quality/report.py "$copies" --out "$study/report"
exit "$status"
