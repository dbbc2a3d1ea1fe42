# shellcheck shell=bash
# Sourced by the scripts: leaves a Python with the tested packages first on PATH, making .venv where none is active.
# Needs the working folder to be the repository.

suitable() { # $1: python; true when it is 3.11+ and has every pinned package in its pinned major version
  command -v "$1" >/dev/null && "$1" - requirements.txt <<'PY' 2>/dev/null
import importlib.metadata as metadata, sys
assert sys.version_info >= (3, 11)
for line in open(sys.argv[1]):
    name, _, version = line.partition("==")
    if version:
        assert metadata.version(name).split(".")[0] == version.strip().split(".")[0], name
PY
}

if ! suitable python; then
  if ! suitable .venv/bin/python; then
    base=
    for candidate in python3 python3.13 python3.12 python3.11; do
      if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        base=$candidate
        break
      fi
    done
    if [ -z "$base" ]; then
      echo "error: Python 3.11 or newer is needed (python3 is $(python3 --version 2>&1 || true))" >&2
      exit 2
    fi
    echo "making .venv with the packages of requirements.txt: some minutes, in which pip says nothing, and 2 GB of disk" \
      "(several GB more where torch comes with CUDA, as it does on Linux)" >&2
    "$base" -m venv .venv
    .venv/bin/python -m pip install -q --disable-pip-version-check -r requirements.txt
  fi
  PATH="$PWD/.venv/bin:$PATH"
fi
export PATH
