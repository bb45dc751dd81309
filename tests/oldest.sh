#!/usr/bin/env bash
# Tests with the oldest versions that pyproject.toml admits, in an environment of their own: .venv-oldest, or RINGLIP_OLDEST_VENV. It takes
# 8 GB (PyPI's torch is a CUDA build) and is brought up to date at each run. Arguments go to pytest:
#
#   bash tests/oldest.sh                      # the parts that meet other packages: about 10 minutes on 2 cores
#   bash tests/oldest.sh -m "not slow"        # everything that CI runs
set -euo pipefail
cd "$(dirname "$0")/.."
venv="${RINGLIP_OLDEST_VENV:-.venv-oldest}"
[ -x "$venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$venv"
python="$venv/bin/python"
"$python" -m pip install --quiet --disable-pip-version-check uv
"$python" -m uv pip install --python "$python" --resolution lowest-direct --requirements pyproject.toml --extra test

export TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
[ $# -gt 0 ] || set -- -m "not slow" tests/test_{cli_main,data_loader,data_tools_shard,data_tools_sources,engine_configs,evaluate,export}.py \
  tests/test_{losses_exchange,losses_objectives,metrics,models,models_lora,models_vision_text,plan,report,step,train}.py
exec "$python" -m pytest "$@"
