#!/usr/bin/env bash
# Create the virtual environment at the first call, then run ds_gpt2/__main__.py.
#
#   DS_GPT2_PYTHON=/path/to/python   use this interpreter (of a container or conda); nothing is installed
#   pip's settings (PIP_INDEX_URL, PIP_FIND_LINKS, ...) apply
if [ -z "${BASH_VERSION:-}" ]; then # started by another shell, as in `sh launch.sh`
  if command -v bash >/dev/null 2>&1; then exec bash "$0" "$@"; fi
  echo 'error: this script needs bash: install it (Debian: apt install bash)' >&2
  exit 2
fi
set -euo pipefail
for descriptor in 0 1 2; do # open closed ones: the next opened file would get their numbers
  if ! { true <&$descriptor || true >&$descriptor; } 2>/dev/null; then
    eval "exec $descriptor<>/dev/null"
  fi
done

script=${BASH_SOURCE[0]}
while [ -L "$script" ]; do
  target=$(readlink "$script")
  case $target in /*) script=$target ;; *) script=$(dirname "$script")/$target ;; esac
done
project=$(cd "$(dirname "$script")" && pwd -P)
venv=$project/.venv
constraints=$project/ds_gpt2/assets/constraints.txt

fail() {
  printf 'error: %s\n' "$1" >&2
  exit 2
}

is_supported() {
  "$1" -I -c 'import sys, venv; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' >/dev/null 2>&1
}

find_python() {
  local name
  for name in python3 python3.13 python3.12 python3.11 python3.10 python; do
    if is_supported "$name"; then
      command -v "$name"
      return
    fi
  done
  fail 'no Python 3.10 to 3.13 with the venv module found: install one (Debian: apt install python3 python3-venv)'
}

# Print a checksum of the requirements.
requirements() {
  cat "$project/pyproject.toml" "$constraints" | cksum
}

# Adapt the environment of a moved or copied project: its scripts contain the directory that it was created in.
relocate() {
  local made_in
  made_in=$(cat "$venv/.made-in" 2>/dev/null) || return 0
  if [ "$made_in" = "$project" ] || [ -L "$venv" ] || [ "$made_in/.venv" -ef "$venv" ]; then
    return 0 # not moved, or the environment of another project
  fi
  "$venv/bin/python" -I - "$made_in" "$project" "$venv" <<'PYTHON' || return 0
import os, pathlib, shutil, sys
old, new, venv = sys.argv[1:]
files = [*pathlib.Path(venv, "bin").iterdir(), *pathlib.Path(venv).glob("lib/python*/site-packages/__editable__*")]
for file in files:
    if file.is_file() and not file.is_symlink():
        content = file.read_bytes()
        changed = content.replace(old.encode() + b"/", new.encode() + b"/").replace(old.encode() + b"'", new.encode() + b"'")
        if changed != content:
            partial = file.with_name(file.name + ".tmp")
            partial.write_bytes(changed)
            shutil.copymode(file, partial)
            os.replace(partial, file)
PYTHON
  echo "$project" >"$venv/.made-in"
}

installed() {
  local stamp
  for stamp in "$@"; do
    if [ -x "$venv/bin/python" ] && [ "$(cat "$venv/.installed-$stamp" 2>/dev/null)" = "$(requirements)" ]; then
      return 0
    fi
  done
  return 1
}

# install EXTRAS STAMP...: do nothing if any of the stamps is current; otherwise install and write the first stamp.
install() {
  local extras=$1 python
  shift
  if installed "$@"; then
    relocate
    return
  fi
  if command -v flock >/dev/null; then
    exec 9>"$project/.install.lock"
    flock 9
  fi
  if ! installed "$@"; then # another shell may have installed it meanwhile
    if ! "$venv/bin/python" -I -m pip --version >/dev/null 2>&1; then # missing, or incomplete
      python=$(find_python) || exit 2
      rm -rf "$venv"
      echo "creating $venv with $("$python" --version) ..."
      "$python" -I -m venv "$venv" || { rm -rf "$venv"; fail "$python cannot create a virtual environment (Debian: apt install python3-venv)"; }
    fi
    echo "installing PyTorch, DeepSpeed and their dependencies (once; takes minutes) ..."
    local quiet=--quiet
    [ -t 1 ] && quiet=--progress-bar=on # show the download on a terminal
    DS_BUILD_OPS=0 "$venv/bin/python" -I -m pip install "$quiet" --disable-pip-version-check \
      --constraint "$constraints" --editable "$project$extras" ||
      fail 'the installation failed, see the lines above (no network, or a full disk?); then run the same command again'
    echo "$project" >"$venv/.made-in"
    requirements >"$venv/.installed-$1"
  fi
  if command -v flock >/dev/null; then
    exec 9>&-
  fi
}

verb=${1:-}
if [ -n "${DS_GPT2_PYTHON:-}" ]; then
  python=$DS_GPT2_PYTHON
  found=$("$python" -c '
import sys
sys.path = [path for path in sys.path if path]  # do not search the working directory
from importlib.util import find_spec
assert sys.version_info >= (3, 10)
missing = [name for name in ("torch", "deepspeed", "pydantic", "psutil") if find_spec(name) is None]
print("lacks", ", ".join(missing) if missing else "nothing")' 2>/dev/null) || found=
  case $found in
    'lacks nothing') ;;
    lacks*) fail "DS_GPT2_PYTHON=$python $found: $python -m pip install --editable '$project', or unset it" ;;
    *) fail "DS_GPT2_PYTHON=$python is not Python 3.10 or newer: set it to such an interpreter, or unset it" ;;
  esac
else
  case "$verb ${2:-}" in
    test\ *) install '[dev]' dev ;;
    prepare\ fineweb* | prepare\ openwebtext | prepare\ hub | prepare\ evaluation) install '[data]' data dev ;;
    *) install '' base data dev ;;
  esac
  python=$venv/bin/python
fi

if [ "$verb" = test ]; then
  shift
  cd "$project"
  workers=$(($(nproc 2>/dev/null || echo 2) + 1)) # a test that waits leaves its core to another one
  parallel=(--numprocesses $((workers < 4 ? workers : 4)) --dist loadfile --no-loadscope-reorder)
  case ${1:-} in
    '') set -- -m 'not extended' "${parallel[@]}" ;;
    --all) set -- "${parallel[@]}" "${@:2}" ;;
    --fast) set -- -m 'not ranks and not slow and not extended' "${parallel[@]}" "${@:2}" ;;
  esac
  exec "$python" -m pytest "$@"
fi
# By path, not with -m: a directory named ds_gpt2 in the working directory would be imported instead of the package.
exec "$python" "$project/ds_gpt2/__main__.py" "$@"
