#!/usr/bin/env bash
# Everything that must pass before a change goes in; at most 10 minutes on 2 cores once everything is installed.
#
#     bash scripts/test.sh [--all] [arguments for pytest]        --all: also the tests that take minutes
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

tests="not long"
for argument in "$@"; do # takes --all out of the arguments and keeps the rest in order
    shift
    if [ "$argument" = --all ]; then tests="long or not long"; else set -- "$@" "$argument"; fi
done

source scripts/setup.sh
install_requirements requirements.txt
install_requirements requirements-test.txt

"$python" -m ruff check
"$python" -m ruff format --check
"$python" -m pytest -m "$tests" "$@"
bash scripts/smoke_all.sh
