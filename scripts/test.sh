#!/usr/bin/env bash
# Everything that must pass before a change goes in; at most 10 minutes on 2 cores once all is installed.
#
#     bash scripts/test.sh [--all] [arguments for pytest]
#
# --all: also the tests that take minutes, and the deliberate faults that the tests must notice.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

source scripts/setup.sh

all=no
for argument in "$@"; do # takes --all out of the arguments and keeps the rest in order
    shift
    if [ "$argument" = --all ]; then all=yes; else set -- "$@" "$argument"; fi
done
install_requirements requirements.txt
install_requirements requirements-test.txt

"$python" -m ruff check
"$python" -m ruff format --check
set -- -n auto --maxprocesses 4 "$@" # a process for each core; a test computes with one thread
if [ "$all" = yes ]; then
    "$python" -m pytest -m "long or not long" "$@"
    # With Lightning, Transformers and others, in an environment on top of this one, which they cannot spoil.
    "$python" -m venv .venv-frameworks
    other=.venv-frameworks/bin/python where='import sysconfig; print(sysconfig.get_path("purelib"))'
    "$python" -c "$where" >"$("$other" -c "$where")/base.pth"
    "$other" -m pip install --quiet -r requirements-frameworks.txt
    "$other" -m pytest tests/optimizer/test_frameworks.py tests/optimizer/test_odd_models.py
    "$python" tests/mutants.py
else
    "$python" -m pytest -m "not long" "$@"
fi
bash scripts/smoke_all.sh
