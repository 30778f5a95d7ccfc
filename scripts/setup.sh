# Sourced by the other scripts, from the repository's root: answers --help, and finds or makes the virtual
# environment. Afterwards $python is its interpreter, and `install_requirements FILE` installs what FILE
# lists. All that they say goes to standard error: standard output is for what the script is called for.

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

make_venv() {
    local base="" candidate
    for candidate in python3 python3.12 python3.11; do # an old python3 often has a newer one beside it
        if is_recent "$candidate"; then base=$candidate && break; fi
    done
    if [ -z "$base" ]; then
        command -v python3 >/dev/null ||
            fail "python3 was not found: install Python 3.11 or later and run this command again."
        fail "$(python3 --version 2>&1) is too old: install Python 3.11 or later and run this command again."
    fi
    "$base" -c 'import ensurepip, venv' 2>/dev/null ||
        fail "$base cannot make virtual environments: install its venv package" \
            "(Debian and Ubuntu: sudo apt install python3-venv) and run this command again."
    echo "Making the virtual environment .venv ..." >&2
    # --clear: what an interrupted earlier attempt left behind has no pip and cannot be mended.
    "$base" -m venv --clear .venv ||
        fail "The virtual environment .venv could not be made: see the message above."
}

if [ -n "${VIRTUAL_ENV:-}" ]; then
    python=$VIRTUAL_ENV/bin/python
    is_recent "$python" ||
        fail "The active virtual environment $VIRTUAL_ENV has no Python 3.11 or later:" \
            "deactivate it and run this command again."
    "$python" -m pip --version >/dev/null 2>&1 ||
        fail "The active virtual environment $VIRTUAL_ENV has no pip:" \
            "run '$python -m ensurepip', or deactivate it and run this command again."
else
    python=$PWD/.venv/bin/python
    if ! is_recent "$python" || ! "$python" -m pip --version >/dev/null 2>&1; then make_venv; fi
fi

# The stamp in the environment says which version of the file was installed last, so that a second run
# starts at once and needs no network.
install_requirements() {
    local stamp hash
    stamp=$("$python" -c 'import sys; print(sys.prefix)')/.installed-$1
    hash=$("$python" -c \
        'import hashlib, sys; print(hashlib.sha256(open(sys.argv[1], "rb").read()).hexdigest())' "$1")
    if [ "$(cat "$stamp" 2>/dev/null)" = "$hash" ]; then return; fi
    rm -f "$stamp" # a failed installation leaves neither the old state nor the new one
    echo "Installing $1 ..." >&2
    "$python" -m pip install --quiet --disable-pip-version-check -r "$1" >&2 ||
        fail "Installing $1 failed: see pip's message above, check the network, and run this command again."
    echo "$hash" >"$stamp"
}
