#!/usr/bin/env bash
# Sets up .venv as launch/quickstart.sh does, then runs the whole test suite, three files at a time, for some of them wait.
# Options are pytest's:
#
#     bash tests/run.sh
#     bash tests/run.sh -x -k checkpoint
set -euo pipefail
case ${1:-} in -h | --help) sed -n '2,/^set/ { /^set/!s/^# \{0,1\}//p; }' "${BASH_SOURCE[0]}"; exit ;; esac
. "$(dirname "${BASH_SOURCE[0]}")/../launch/setup.sh"
set_up
exec "$python" -m pytest tests -n 3 --dist loadfile --no-loadscope-reorder "$@"
