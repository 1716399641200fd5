#!/usr/bin/env bash
# An environment for each rival, with the versions of requirements/NAME.txt:
#
#     bash benchmarks/rivals/install.sh                 # pfl, flower, blazefl and fedjax
#     bash benchmarks/rivals/install.sh pfl flower      # some of them
#
# They go to .rivals, or to the folder that RIVALS names. PYTHON names the interpreter, 3.11 here;
# TORCH is what pip is told to install as PyTorch, as in the Makefile:
#
#     TORCH="torch==2.13.0 --index-url URL" bash benchmarks/rivals/install.sh

set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
envs=${RIVALS:-$here/../../.rivals}

[ $# -gt 0 ] || set -- pfl flower blazefl fedjax
for name in "$@"; do
    [ -f "$here/requirements/$name.txt" ] || { echo "unknown rival: $name" >&2; exit 1; }
    "${PYTHON:-python3}" -m venv "$envs/$name"
    pip() { "$envs/$name/bin/python" -m pip --disable-pip-version-check --quiet "$@"; }
    # Alone and first, so that nothing else decides which build of PyTorch it is.
    # shellcheck disable=SC2086
    [ "$name" = fedjax ] || pip install ${TORCH:-torch==2.13.0}
    # The lists are complete. BlazeFL asks for a newer Python than it needs.
    pip install --no-deps --ignore-requires-python -r "$here/requirements/$name.txt"
    echo "$name is in $envs/$name"
done
