#!/usr/bin/env bash
# From nothing to a trained SigLIP: environment, real pairs, shards, training under DeepSpeed, evaluation, export, memory plan, report.
#
#   bash launch/quickstart.sh [section.key=value ...]      # overrides go to the training recipe
#
# All GPUs are used; without one, two CPU ranks over gloo. Safe to interrupt and to run again: what is there is used.
set -euo pipefail
case "${1:-}" in -h | --help) sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"; exit ;; esac # before anything is installed
cd "$(dirname "$0")/.."
source launch/setup.sh

data=demo
run=runs/quickstart
recipe=trainer/recipes/glyphs.yaml
export TOKENIZERS_PARALLELISM=false
began=$SECONDS
trap 'code=$?; [ $code -eq 0 ] || echo "stopped (exit $code) after $((SECONDS - began)) s; run the same command again: it goes on from here" >&2' EXIT

step() { # step "title" "where the result lies" command ...
  local title=$1 result=$2 start=$SECONDS
  shift 2
  echo
  echo "== $title"
  "$@"
  echo "   $((SECONDS - start)) s -> $result"
}

gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
if [ "$gpus" -gt 0 ]; then
  ranks=$gpus
else
  ranks=2
  export DS_ACCELERATOR=cpu
  # The ranks share the cores: more threads than cores make every step slower.
  export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$(((($(nproc) + 1) / ranks)))}"
fi

shard() { # shard PART
  python -m data_tools shard "$data/pairs/$1.csv" "$data/shards/$1" --image image --caption caption
}

forecast() {
  python -m trainer.plan "$recipe" --gpu-memory 8GiB --gpus "$ranks" --out "$run/plan.svg" >"$run/plan.txt"
}

step "render the demo pairs" "$data/pairs" python -m data_tools glyphs "$data/pairs"
for part in train validation test; do
  step "shard the $part pairs" "$data/shards/$part" shard "$part"
done
step "make a tokenizer" "$data/tokenizer" python -m data_tools vocabulary "$data/shards/train" "$data/tokenizer"
step "train on $ranks rank(s)" "$run" \
  deepspeed --num_accelerators "$ranks" --master_port "${MASTER_PORT:-29511}" --module trainer.train "$recipe" run.directory="$run" "$@"
step "export for transformers" "$run/export" python -m trainer.export "$run" "$run/export"
step "evaluate the exported model on unseen pairs" "$run/evaluation.json" \
  python -m trainer.evaluate "$run/export" --data "$data/shards/test" --out "$run/evaluation.json" \
  --label face --templates '{character}, {face}' --accept faces
step "forecast the memory of a small card" "$run/plan.txt" forecast
step "write the report" "$run/report.html" python -m trainer.report "$run"

echo
echo "Done in $((SECONDS - began)) s. Open $run/report.html; the model in $run/export loads with transformers.AutoModel."
echo "Search its images by words: $venv/bin/ringlip search $run/export $data/shards/test"
