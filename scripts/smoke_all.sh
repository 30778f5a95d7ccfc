#!/usr/bin/env bash
# Every network of the paper's tables with every method: a whole short run of main.py each, in minutes on 2 cores.
# The pictures are handwritten digits, few: 4 to train in 2 steps, 2 to test, as WRN-40-10 takes a second for each.
# A run fails if a loss or a weight is not finite. Everything goes to a temporary directory, removed at the end.
#
#     bash scripts/smoke_all.sh                JOBS: runs at once, with a core each where there is no GPU (2)
set -euo pipefail
case ${1-} in -h | --help)
    sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"
    exit
    ;;
esac
source "$(dirname "${BASH_SOURCE[0]}")/sweep.sh"
cd "$root"
source scripts/setup.sh
install_requirements requirements.txt

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
"$python" - "$scratch/digits" <<'PYTHON'
import sys
from pathlib import Path

import cv2
from sklearn.datasets import load_digits

pictures, labels = load_digits(return_X_y=True)
for label in (0, 1):
    for number, row in enumerate((labels == label).nonzero()[0][:3]):
        directory = Path(sys.argv[1], "train" if number < 2 else "test", str(label))
        directory.mkdir(parents=True, exist_ok=True)
        picture = (pictures[row].reshape(8, 8) * 15).astype("uint8")
        cv2.imwrite(str(directory / f"{number}.png"), cv2.resize(picture, (32, 32)))
PYTHON

smoke() { # MODEL METHOD
    local directory=$scratch/$1-$2 start=$SECONDS code=0
    # shellcheck disable=SC2046
    "$python" main.py $(model_flags "$1") --optim_method "$2" --dataset folder --dataset_name digits \
        --dataroot "$scratch/digits" --batchSize 2 --epochs 1 --epoch_step '[]' --nthread 0 \
        --save "$directory" >"$directory.txt" 2>&1 || code=$?
    if [ "$code" -eq 0 ] && [ -s "$directory/checkpoint.pt" ] && [ -s "$directory/log.txt" ]; then
        echo "ok      $1 $2 ($((SECONDS - start)) s)"
    else
        echo "FAILED  $1 $2 with exit code $code:"
        tail -n 5 "$directory.txt"
        code=1
    fi
    rm -rf "$directory" # checkpoints of up to 450 MB
    return "$code"
}
export -f smoke model_flags
export python scratch OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

# The largest first, so that the cores end together.
for model in wrn-40-10 wrn-28-10 wrn-22-8 vgg-19 vgg-13 wrn-16-4; do
    printf '%s\n' "$model SGD" "$model SGDG" "$model AdamG"
done | xargs -P "${JOBS:-2}" -L 1 bash -c 'smoke "$@"' smoke ||
    fail "smoke_all.sh: a network and method above did not train."
echo "every network of the tables trains with every method"
