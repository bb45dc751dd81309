#!/usr/bin/env bash
# Proves on a GPU what the other tests prove on CPUs: a table with a criterion a line, and JSON with --out.
#
#   bash tests/gpu/run.sh --out gpu.json        # one card of 24 GB or more; two or more cards add the lines for several ranks
#   bash tests/gpu/run.sh --dry                 # toy sizes on the CPU
#
# Uses .venv where there is one, else the python on the PATH with what it has; WHEELS=DIR installs what is missing from a folder of
# wheels, without a network and without touching torch.
set -euo pipefail
cd "$(dirname "$0")/../.."
venv="${RINGLIP_VENV:-.venv}"
if [ -x "$venv/bin/python" ]; then
  PATH="$(cd "$venv/bin" && pwd):$PATH"
fi
python="${PYTHON:-$(command -v python || command -v python3)}"
if [ -n "${WHEELS:-}" ]; then
  "$python" -m pip install --quiet --no-index --find-links "$WHEELS" --no-deps "$WHEELS"/*.whl
fi
export TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 TRITON_CACHE_DIR="${TRITON_CACHE_DIR:-/tmp/ringlip-triton}"
exec "$python" -W ignore -m tests.gpu "$@"
