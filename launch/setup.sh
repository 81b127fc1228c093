# Sourced by launch/quickstart.sh and tests/run.sh. set_up leaves in $python an interpreter that has all packages:
#
#     otherwise                  .venv/bin/python, made by the first Python 3.10 to 3.12 found, filled once, and filled
#                                again when requirements.txt has changed
#     PYTHON=/path/to/python     that one, with the packages it has; nothing is installed

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"

die() { echo "error: $*" >&2; exit 1; }

# ---- running a command so that Ctrl-C ends it and all it has started ------------------------------------------------

child=

tree() {  # prints a process and all below it
    local pid
    echo "$1"
    for pid in $(awk -v parent="$1" '/^Pid:/ { pid = $2 } /^PPid:/ && $2 == parent { print pid }' \
                     /proc/[0-9]*/status 2>/dev/null); do
        tree "$pid"
    done
}

kill_child() {
    [ -z "$child" ] || kill -KILL $(tree "$child") 2>/dev/null || true
    [ -z "$child" ] || wait "$child" 2>/dev/null || true  # without the shell's own word on it
    child=
}

trap kill_child EXIT
trap 'echo; echo "stopped; the same command goes on from here" >&2; exit 130' INT
trap 'exit 143' TERM HUP

start() { "$@" & child=$!; }  # bash puts off a trap until a command in the foreground ends, hence the background

finish() {  # waits for what was started; its status
    local status=0
    wait "$child" || status=$?
    child=
    return $status
}

await() { start "$@"; finish; }

# ---- Python and packages --------------------------------------------------------------------------------------------

fits() { "$1" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; }

find_python() {  # sets $found
    local name without_venv=
    for name in python3 python3.12 python3.11 python3.10 python; do
        found=$(command -v "$name") && fits "$found" || continue
        "$found" -c 'import ensurepip, venv' 2>/dev/null && return
        without_venv=${without_venv:-$found}
    done
    [ -z "$without_venv" ] || die "$without_venv: its venv module is missing; on Debian and Ubuntu: apt-get install python3-venv"
    die "Python 3.10, 3.11 or 3.12 is needed, and there is none on PATH ($(python3 --version 2>&1 | head -n 1 || true))"
}

set_up() {  # sets $python
    local stamp=$root/.venv/requirements.txt log=$root/.venv/pip.log
    if [ -n "${PYTHON:-}" ]; then
        python=$(command -v "$PYTHON") || die "PYTHON=$PYTHON: there is no such program"
        fits "$python" || die "PYTHON=$PYTHON: Python 3.10, 3.11 or 3.12 is needed"
        check_packages || die "PYTHON=$PYTHON: install what is missing with: $PYTHON -m pip install -r requirements.txt"
        echo "$python and its packages, as PYTHON says; nothing is installed"
        return
    fi
    python=$root/.venv/bin/python
    if cmp -s requirements.txt "$stamp" && fits "$python"; then
        echo ".venv has what requirements.txt asks for"
        return
    fi
    if [ ! -e "$python" ]; then
        find_python
        echo "making .venv with $found ($("$found" --version))"
        await "$found" -m venv "$root/.venv" || die ".venv: could not be made; see above"
    fi
    fits "$python" || die ".venv: is not of Python 3.10, 3.11 or 3.12; remove it and run this again"
    "$python" -m pip --version >/dev/null 2>&1 || "$python" -m ensurepip -q || die ".venv: has no pip; remove it and run this again"
    rm -f "$stamp"
    echo "installing requirements.txt into .venv (once; a CUDA build of torch is some GB)"
    start "$python" -m pip install --disable-pip-version-check -r requirements.txt >"$log" 2>&1
    show_progress "$log"
    finish || { grep -i '^error' "$log" | tail -n 5 >&2; die "pip could not install requirements.txt; all it said is in $log"; }
    cp requirements.txt "$stamp.partial"
    mv "$stamp.partial" "$stamp"  # last, so that an interrupted installation does not count
    echo "installed in $((SECONDS / 60)) min $((SECONDS % 60)) s"
}

show_progress() {  # the last line of a log and the time, while the child runs; one line on a terminal, a few elsewhere
    local started=$SECONDS last
    while kill -0 "$child" 2>/dev/null; do
        last=$(tail -n 1 "$1" | tr -d '\r' | cut -c 1-"$((${COLUMNS:-100} - 12))")
        if [ -t 1 ]; then
            printf '\r\033[K  %4d s  %s' $((SECONDS - started)) "$last"
        elif (((SECONDS - started) % 15 == 0)); then
            printf '  %4d s  %s\n' $((SECONDS - started)) "$last"
        fi
        sleep 1
    done
    [ ! -t 1 ] || printf '\r\033[K'
}

check_packages() {  # names what $python lacks of requirements.txt
    "$python" - <<'EOF'
import re, sys
from importlib.metadata import PackageNotFoundError, version
missing = []
for line in open("requirements.txt"):
    if name := re.match(r"[\w-]+", line):
        try:
            version(name[0])
        except PackageNotFoundError:
            missing.append(name[0])
sys.exit(f"error: {sys.executable} has no {', '.join(missing)}" if missing else 0)
EOF
}
