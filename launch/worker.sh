#!/usr/bin/env bash
# On each machine of a slice, in the unpacked code: makes the environment, then hands over to
# launch/worker.py with the same arguments (start, status, stop, foreground; "setup" ends here).
#
#   LLM_JAX_HOME     where runs and environments lie (default: ~/llm_jax_runs)
#   LAUNCH_PYTHON    a Python that has everything: nothing is installed
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export LLM_JAX_HOME="${LLM_JAX_HOME:-$HOME/llm_jax_runs}"
mkdir -p "$LLM_JAX_HOME"

# TPU VMs come with Python 3.10, which is too old: uv brings one.
new_environment() {
  local name
  for name in python3.12 python3.11; do
    if "$name" -c 'import ensurepip, venv' 2>/dev/null; then
      "$name" -m venv "$1"
      return
    fi
  done
  python3 -m pip install --quiet --user --upgrade uv
  python3 -m uv venv --quiet --seed --python 3.12 "$1"
}

install() {
  local venv="$1" version lock
  new_environment "$venv"
  version="$("$venv/bin/python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')"
  lock="requirements-$version.lock"
  "$venv/bin/python" -m pip install --quiet --progress-bar=off --editable '.[tpu]' --constraint "$lock"
  touch "$venv/.installed"
}

python="${LAUNCH_PYTHON:-}"
if [[ -z "$python" ]]; then
  # One environment for all code that asks for the same packages.
  key="$(cat setup.py requirements-*.lock | sha256sum | cut -c1-12)"
  venv="$LLM_JAX_HOME/venv-$key"
  python="$venv/bin/python"
  if [[ ! -e "$venv/.installed" ]]; then
    echo "$(hostname): installing into $venv (some minutes, once)"
    exec 9>"$venv.lock"
    flock 9  # a second set-up waits for the first, and then finds its work done
    [[ -e "$venv/.installed" ]] || { rm -rf "$venv"; install "$venv"; }
    exec 9>&-
  fi
fi
if [[ "$1" == setup ]]; then
  echo "$(hostname): $("$python" --version) is set up"
  exit 0
fi
exec "$python" -m launch.worker "$@"
