#!/usr/bin/env bash
# Every network of the paper's tables with every method: a whole short run of main.py each, in minutes on 2
# cores. The pictures are noise, and few: 4 to train in 2 steps, 2 to test, as WRN-40-10 takes a second for
# each. A run fails if a loss or a weight is not finite. Everything goes to a temporary directory, removed at
# the end.
#
#     bash scripts/smoke_all.sh        JOBS: networks at once, a core each where there is no GPU (2)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup.sh
install_requirements requirements.txt

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

# The largest first, so that the cores end together.
printf '%s\n' wrn-40-10 wrn-28-10 wrn-22-8 vgg-19 vgg-13 wrn-16-4 |
    xargs -P "${JOBS:-2}" -I {} "$python" scripts/smoke_network.py {} "$scratch" ||
    fail "smoke_all.sh: a network and method above did not train."
echo "every network of the tables trains with every method"
