#!/usr/bin/env bash
# The quality study from nothing to its report. Each step picks up what is there.
#   scripts/quality/run.sh [part:PART | ARM[@RECIPE][#SEED] ...]    (all of configs/quality/plan.yaml)
# Settings, with their defaults:
#   STUDY=runs/quality            everything is written here
#   TREE=$STUDY/linux-source-6.1  a source tree; unpacked from Debian's linux-source-6.1 if missing
#   PIECES                        a folder that pieces.py packed, with tokenizer/: in place of TREE
#   HOLD_OUT="0.02 2"             of TREE, held out: this share, in subtrees so many folders down
#   VOCABULARY=16384              tokens of the tokenizer that is trained
#   RECIPE=configs/quality/recipe.yaml
#   COPIES=$STUDY/results         a small JSON per arm, written anew whenever an arm gets further
#   LIMIT                         seconds for everything: an arm that would not end in them waits
#   BUNDLE                        a .tgz of results, report and logs, written at the end
#   GPUS_PER_ARM=1                arms run side by side, each on so many GPUs
#   ARMS_PER_GPU=1                or so many arms share a GPU; then their times say nothing
#   PYTHON                        an interpreter that has everything; left out: .venv is made
set -euo pipefail
cd "$(dirname "$0")/../.."
. scripts/common.sh

study=${STUDY:-runs/quality}
data=$study/data tree=${TREE:-$study/linux-source-6.1}
read -r share depth <<<"${HOLD_OUT:-0.02 2}"
recipe=${RECIPE:-configs/quality/recipe.yaml} copies=${COPIES:-$study/results}
mkdir -p "$data" "$copies"
if [ -z "${PYTHON:-}" ]; then
    make_venv ""
fi
find_training_python "$PWD"

if [ ! -e "$data/text.idx" ] && [ -n "${PIECES:-}" ]; then
    echo "== text: unpacking $PIECES"
    "$python" scripts/quality/pieces.py unpack "$PIECES" "$data"
    cp -r "$PIECES/tokenizer" "$data/"
elif [ ! -e "$data/text.idx" ]; then
    if [ ! -d "$tree" ]; then
        echo "== source: Debian's linux-source-6.1 (139 MB)"
        (cd "$study" && apt-get download linux-source-6.1)
        dpkg-deb --fsys-tarfile "$study"/linux-source-6.1_*.deb |
            tar xO ./usr/src/linux-source-6.1.tar.xz | tar xJ -C "$study"
    fi
    echo "== text: a tokenizer, a document per directory, held-out subtrees"
    generated='*/asic_reg/*'   # 400 MB of register tables
    [ -e "$data/tokenizer" ] || "$python" scripts/quality/tokenizer.py "$tree" "$data/tokenizer" \
        --exclude "$generated" --vocabulary "${VOCABULARY:-16384}"
    "$python" -m s2megatron.cli data "$tree" --suffix '*' --exclude "$generated" --skip-bad \
        --group-by directory --hold-out "$share" --hold-out-depth "$depth" \
        --tokenizer "huggingface:$data/tokenizer" --out "$data/text" --hold-out-to "$data/valid"
fi

mapfile -t arms < <("$python" scripts/quality/plan.py expand "$@")
[ ${#arms[@]} -gt 0 ] || exit 2   # plan.py has said why
recipes=()
for arm in "${arms[@]}"; do
    arm=${arm%%#*}
    case $arm in
        *@*) recipes+=(--recipe "${arm#*@}") ;;
        *) recipes+=(--recipe "$recipe") ;;
    esac
done
echo "== retrieval documents for every phase"
"$python" scripts/quality/prepare.py "$data" "${recipes[@]}"

echo "== arms: ${arms[*]}"
status=0 left=inf
[ -z "${LIMIT:-}" ] || left=$((LIMIT - SECONDS - 15))   # 15: the report
"$python" scripts/quality/study.py --recipe "$recipe" --data "$data" --out "$study/arms" \
    --copies "$copies" --gpus-per-arm "${GPUS_PER_ARM:-1}" \
    --arms-per-gpu "${ARMS_PER_GPU:-1}" --seconds "$left" "${arms[@]}" || status=$?
"$python" scripts/quality/report.py "$copies" --out "$study/report"
if [ -n "${BUNDLE:-}" ]; then
    find "$study/arms" -maxdepth 2 -name '*.txt' -size -2M >"$study/logs"
    tar czf "$BUNDLE" "$copies" "$study/report" -T "$study/logs"
fi
exit "$status"
