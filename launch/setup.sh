#!/usr/bin/env bash
# Makes .venv from requirements.txt with this checkout in it (the command `ringlip`, `import ringlip`), or leaves it alone when it already
# matches. Sourced by quickstart.sh and tests/run.sh.
#
#   source launch/setup.sh        # from the repository root; then `python` is the environment's
#
# RINGLIP_VENV names another place for the environment; PYTHON another interpreter (3.11 or newer).
set -euo pipefail
venv="${RINGLIP_VENV:-.venv}"
python="${PYTHON:-python3}"

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
  echo "error: $("$python" --version 2>&1) is too old: install Python 3.11 or newer, or set PYTHON=/path/to/it" >&2
  exit 2
}
stamp="$venv/.requirements.sha256"
want="$(sha256sum requirements.txt | cut -d' ' -f1) $("$python" -c 'import sys; print(sys.version)')"
if [ ! -f "$stamp" ] || [ "$(cat "$stamp")" != "$want" ]; then
  echo "== environment: $venv (once; a few minutes)"
  "$python" -m venv "$venv"
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --upgrade pip
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -r requirements.txt
  echo "$want" >"$stamp" # last: an interrupted install is done again
fi
stamp="$venv/.ringlip.sha256"
want="$(sha256sum pyproject.toml | cut -d' ' -f1) $PWD"
if [ ! -f "$stamp" ] || [ "$(cat "$stamp")" != "$want" ]; then
  PYTHONWARNINGS=ignore "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
  echo "$want" >"$stamp"
fi
PATH="$(cd "$venv/bin" && pwd):$PATH"
export PATH
