#!/usr/bin/env bash
# Sets up as the quickstart does, then lints, types and tests. Arguments go to pytest:
#
#   bash tests/run.sh                     # everything CI runs
#   bash tests/run.sh -k ring             # tests whose name has "ring", without lint and types
#   bash tests/run.sh -m slow             # the exhaustive matrices
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/setup.sh

export TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 DS_ACCELERATOR="${DS_ACCELERATOR:-}"
[ -n "$DS_ACCELERATOR" ] || unset DS_ACCELERATOR

if [ $# -gt 0 ]; then
  exec python -m pytest "$@"
fi
ruff check .
ruff format --check .
mypy
exec python -m pytest -m "not slow"
