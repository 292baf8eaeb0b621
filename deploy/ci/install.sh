#!/usr/bin/env bash
# Installs gradmap into a virtual environment: install.sh SOURCE EXTRA VENV (SOURCE: a checkout; VENV: absolute)
set -euo pipefail
source=$1 extra=$2 venv=$3

constraints=()
case $extra in
  cpu)
    # vLLM's CPU build loads libnuma, and compiles kernels at its first start.
    if ! command -v g++ >/dev/null || ! /sbin/ldconfig -p | grep libnuma.so.1 >/dev/null; then
      as_root=(sudo)
      [ "$(id -u)" -ne 0 ] || as_root=()
      "${as_root[@]}" apt-get update --quiet
      "${as_root[@]}" apt-get install --quiet --yes --no-install-recommends g++ libnuma1
    fi
    constraints=(--torch-backend cpu --constraints constraints/cpu.txt)
    ;;
  gpu) ;;
  *)
    echo "The extra is '$extra'; known are cpu and gpu." >&2
    exit 2
    ;;
esac

python3 -m venv "$venv"
"$venv/bin/pip" install --quiet uv
cd "$source" # where uv finds the overrides in pyproject.toml
"$venv/bin/uv" pip install --quiet --python "$venv" ".[$extra,eval]" "${constraints[@]}"
