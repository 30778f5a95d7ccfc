#!/usr/bin/env bash
# Everything that must pass before a change goes in; in minutes on 2 cores once all is installed.
#
#     bash scripts/test.sh                           the linter and all tests but the long ones
#     bash scripts/test.sh FILE or other arguments   only what they tell pytest
#     bash scripts/test.sh --all                     also the long tests, those with other frameworks, and the
#                                                    deliberate faults that the tests must notice
set -euo pipefail
cd "$(dirname "$(realpath "$0")")/.."
source scripts/setup.sh
install_requirements requirements.txt requirements-test.txt

pytest=("$python" -m pytest -n auto --maxprocesses 4) # a process for each core; a test computes with one thread
if [ $# -gt 0 ] && [ "$1" != --all ]; then exec "${pytest[@]}" -m "not long" "$@"; fi
"$python" -m ruff check
"$python" -m ruff format --check
if [ $# = 0 ]; then exec "${pytest[@]}" -m "not long"; fi
"${pytest[@]}" -m "long or not long"
# With Lightning, Transformers and others, in an environment on top of this one, which they cannot spoil.
"$python" -m venv .venv-frameworks
other=.venv-frameworks/bin/python where='import sysconfig; print(sysconfig.get_path("purelib"))'
"$python" -c "$where" >"$("$other" -c "$where")/base.pth"
"$other" -m pip install --quiet -r requirements-frameworks.txt
"$other" -m pytest tests/optimizer/test_frameworks.py
"$python" tests/mutants.py
