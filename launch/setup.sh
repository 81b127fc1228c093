# Sourced by launch/quickstart.sh and tests/run.sh. set_up leaves in $python an interpreter that has all packages:
#
#     PYTHON=/path/to/python     that one, with the packages it has; nothing is installed
#     otherwise                  .venv/bin/python, made by the first Python 3.10 to 3.12 found, filled once, and filled
#                                again when requirements.txt has changed

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"

die() { echo "error: $*" >&2; exit 1; }

# ---- running a command so that Ctrl-C ends it and all it has started ------------------------------------------------

child=

start() {  # a command in the background, for the shell puts off traps while one runs in the foreground
    set -m  # with a process group of its own, for otherwise it would ignore Ctrl-C for ever
    "$@" </dev/null &
    child=$!
    set +m
}

running() { kill -0 "$child" 2>/dev/null; }

finish() {  # waits for what was started; its status
    local status=0
    wait "$child" || status=$?
    child=
    return $status
}

await() { start "$@"; finish; }

tree() {  # a process and all below it
    local pid
    echo "$1"
    for pid in $(awk -v parent="$1" '/^Pid:/ { pid = $2 } /^PPid:/ && $2 == parent { print pid }' \
                     /proc/[0-9]*/status 2>/dev/null); do
        tree "$pid"
    done
}

kill_child() {  # at once, with SIGKILL
    kill -KILL $(tree "$child") 2>/dev/null || true
    { finish; } 2>/dev/null || true  # the shell would have its word on it
}

stop_child() {  # with five seconds to tidy up
    local tenths=0 all
    [ -n "$child" ] || return 0
    all=$(tree "$child")
    kill -INT -- "-$child" 2>/dev/null || true
    while running && ((tenths++ < 50)); do sleep 0.1; done
    kill -KILL $all 2>/dev/null || true
    { finish; } 2>/dev/null || true
}

trap stop_child EXIT
trap 'trap "" INT; echo >&2; echo "stopped; the same command goes on from here" >&2; exit 130' INT
trap 'exit 143' TERM HUP

# ---- Python and packages --------------------------------------------------------------------------------------------

fits() { "$1" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; }

find_python() {  # sets $found
    local name version others= without_venv=
    for name in python3 python3.12 python3.11 python3.10 python; do
        found=$(command -v "$name") && version=$("$found" --version 2>&1) || continue  # pyenv's shims may lead nowhere
        if ! fits "$found"; then
            others="$others, $name is $version"
        elif ! "$found" -c 'import ensurepip, venv' 2>/dev/null; then
            without_venv=$found
        else
            return 0
        fi
    done
    [ -z "$without_venv" ] || die "$without_venv has no venv module; on Debian and Ubuntu: apt-get install python3-venv"
    die "Python 3.10, 3.11 or 3.12 is needed on PATH${others:- (there is no Python at all)}"
}

set_up() {  # sets $python
    local stamp=$root/.venv/requirements.txt
    if [ -n "${PYTHON:-}" ]; then
        python=$(command -v "$PYTHON") || die "PYTHON=$PYTHON: there is no such program"
        fits "$python" || die "PYTHON=$PYTHON: Python 3.10, 3.11 or 3.12 is needed"
        check_packages
        echo "$python with the packages it has, as PYTHON says"
    else
        python=$root/.venv/bin/python
        if [ "$(cat "$stamp" 2>/dev/null)" = "$(cat requirements.txt)" ] && fits "$python"; then
            echo ".venv has all packages"
        else
            install "$stamp"
        fi
    fi
    # What `source .venv/bin/activate` does: launch/train.sh takes this Python too.
    export VIRTUAL_ENV PATH
    VIRTUAL_ENV=$("$python" -c 'import sys; print(sys.prefix)')
    PATH=$VIRTUAL_ENV/bin:$PATH
}

install() {  # requirements.txt into .venv, then the stamp: a copy of it
    local log=$root/.venv/pip.log
    if [ ! -e "$python" ]; then
        find_python
        echo "making .venv with $found, $("$found" --version)"
        await "$found" -m venv .venv || die ".venv: could not be made; see above"
    fi
    fits "$python" || die ".venv: is not of Python 3.10, 3.11 or 3.12; remove it and run this again"
    if ! "$python" -m pip --version >/dev/null 2>&1; then  # interrupted, or made by uv
        await "$python" -m ensurepip >/dev/null || die ".venv: has no pip; remove it and run this again"
    fi
    rm -f "$1"
    echo "installing requirements.txt into .venv, once (a CUDA build of torch is several GB)"
    start "$python" -m pip install --disable-pip-version-check --progress-bar off -r requirements.txt >"$log" 2>&1
    show_progress "$log"
    if ! finish; then
        grep -i '^error' "$log" | tail -n 3 >&2 || true
        die "pip could not install requirements.txt; .venv/pip.log has it all"
    fi
    cp requirements.txt "$1.partial"
    mv "$1.partial" "$1"  # last, so that an interrupted installation does not count
    echo "installed in $((SECONDS / 60)) min $((SECONDS % 60)) s"
}

show_progress() {  # the last line of a log, while the child runs: one line on a terminal, elsewhere one every 15 s
    local began=$SECONDS told=-15 width last
    width=$(tput cols 2>/dev/null || echo 100)
    while running; do
        last=$(tail -n 1 "$1" | cut -c 1-$((width - 12)))
        if [ -t 1 ]; then
            printf '\r\033[K  %4d s  %s' $((SECONDS - began)) "$last"
        elif ((SECONDS - told >= 15)); then
            told=$SECONDS
            printf '  %4d s  %s\n' $((SECONDS - began)) "$last"
        fi
        sleep 0.5
    done
    [ ! -t 1 ] || printf '\r\033[K'
}

check_packages() {  # dies, naming what $python lacks
    "$python" - <<'EOF' || die "PYTHON=$PYTHON: try $PYTHON -m pip install -r requirements.txt"
import re
import sys
from importlib.metadata import PackageNotFoundError, version

missing = []
for name in re.findall(r"^[\w-]+", open("requirements.txt").read(), re.MULTILINE):
    try:
        version(name)
    except PackageNotFoundError:
        missing.append(name)
sys.exit(f"error: {sys.executable} has no {', '.join(missing)}" if missing else 0)
EOF
}
