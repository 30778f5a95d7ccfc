# shellcheck shell=bash
# Sourced by the other scripts, from the repository's root: answers --help, and finds or makes the environment.
# Afterwards $python is its interpreter, and `install_requirements FILE...` installs what the files list. All
# that they say goes to standard error: standard output is for what the script is called for.
#
# The interpreter is PYTHON's, else that of the active environment (VIRTUAL_ENV, CONDA_PREFIX), else .venv's.

for argument in "$@"; do # the arguments of the script that sources this
    case $argument in
    --) break ;; # what follows is for others
    -h | --help)
        sed -n '2,/^[^#]/s/^# \{0,1\}//p' "scripts/${0##*/}"
        exit
        ;;
    esac
done

fail() {
    echo "$*" >&2
    exit 1
}

is_recent() { # 3.11 or later
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
}

is_usable() { # whether $python is, by pip or by uv (whose environments have no pip); else $missing says why not
    missing="was not found"
    command -v "$python" >/dev/null || return
    missing="is not Python 3.11 or later"
    is_recent "$python" || return
    pip=("$python" -m pip install --quiet --disable-pip-version-check) missing="has no pip, and uv was not found"
    if ! "$python" -m pip --version >/dev/null 2>&1; then
        pip=(uv pip install --quiet --python "$python")
        command -v uv >/dev/null || return
    fi
}

make_venv() {
    local base="" candidate options=() mark=.venv/made-by-setup.sh
    if [ -L .venv ] || { [ -e .venv ] && [ ! -e $mark ]; }; then
        fail ".venv cannot be used, as its Python $missing; it was not made here and is left alone:" \
            "remove or rename it, or activate another environment, and run this command again."
    fi
    for candidate in python3 python3.{14..11}; do # an old python3 often has a newer one beside it
        if is_recent "$candidate"; then base=$candidate && break; fi
    done
    if [ -z "$base" ]; then fail "No Python 3.11 or later was found: install one and run this command again."; fi
    "$base" -c 'import ensurepip, venv' 2>/dev/null ||
        fail "$base cannot make virtual environments: install its venv package" \
            "(Debian and Ubuntu: sudo apt install python3-venv), or name an interpreter by PYTHON=."
    echo "Making the virtual environment .venv ..." >&2
    if "$base" -c 'import sys, importlib.util as i
sys.exit(sys.prefix != sys.base_prefix or not i.find_spec("torch"))'; then
        echo "It uses the packages that $base has, torch among them: they are not downloaded again." >&2
        options=(--system-site-packages)
    fi
    rm -rf .venv # what an interrupted earlier attempt left behind
    mkdir .venv
    touch $mark
    "$base" -m venv "${options[@]}" .venv ||
        fail "The virtual environment .venv could not be made: see the message above."
}

if [ -n "${PYTHON:-}" ]; then
    python=$PYTHON
elif [ -n "${VIRTUAL_ENV:-${CONDA_PREFIX:-}}" ]; then
    python=${VIRTUAL_ENV:-$CONDA_PREFIX}/bin/python
else
    python=$PWD/.venv/bin/python
    is_usable || make_venv
fi
is_usable || fail "$python $missing: deactivate its environment, or name another interpreter by PYTHON=."

install_requirements() { # FILE...: in a second and without the network where nothing is missing
    local file files=()
    for file in "$@"; do files+=(-r "$file"); done
    if "${pip[@]}" --no-index "${files[@]}" >/dev/null 2>&1; then return; fi
    echo "Installing what is missing of $* (torch with CUDA is 3 GB: some minutes) ..." >&2
    "${pip[@]}" "${files[@]}" >&2 ||
        fail "Installing $* failed or was stopped: see the message above, and run this command again."
}
