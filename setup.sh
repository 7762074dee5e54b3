# Makes or reuses .venv beside this file and installs the requirements files named, each only when it changed.
# Sourced by run_all.sh and run_tests.sh; leaves the shell in this folder with the environment's python first.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
if [ ! -x .venv/bin/python ]; then
  python=${PYTHON:-python3}
  if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "setup.sh: error: $python is not Python 3.11 or newer: set PYTHON to one that is" >&2
    exit 2
  fi
  "$python" -m venv .venv
fi
.venv/bin/python -m pip --version >/dev/null 2>&1 || .venv/bin/python -m ensurepip  # a set-up that was killed
for requirements in "$@"; do
  installed=.venv/$requirements  # what was installed last
  if ! cat "$requirements" constraints.txt | cmp -s - "$installed"; then
    echo "installing $requirements into .venv"
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -r "$requirements" -c constraints.txt
    cat "$requirements" constraints.txt >"$installed"
  fi
done
export PATH="$PWD/.venv/bin:$PATH"
