#!/usr/bin/env bash
# What the first half hour on a GPU is for, in one command: the tests that need one, then the speed of the
# optimizers and of training WRN-28-10.
#
#     bash benchmarks/gpu.sh [minutes]                       (30 by default)
#
# A part that fails says so and stops no other. What the parts print goes to logs/gpu, all figures go to one
# file, logs/gpu.json. The same command again skips the parts that are done there.
#
# Environment variables:
#     OUT       another folder than logs/gpu
#     NETWORK   flags that name the network ("--depth 28 --width 10")
#     SETTING   flags of speed and precision ("--dtype bfloat16 --compile")
#     ROUNDS    of each measurement (15)
#     DEVICE    cuda, or cpu to try this script
set -uo pipefail
if ! [[ ${1:-30} =~ ^[1-9][0-9]{0,4}$ ]] || [ $# -gt 1 ]; then
    echo "gpu.sh: error: '$*' is no number of minutes; usage: bash benchmarks/gpu.sh [minutes]" >&2
    exit 2
fi
ends=$((SECONDS + 60 * ${1:-30}))
CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." >/dev/null || exit
source scripts/setup.sh
install_requirements requirements.txt
install_requirements requirements-test.txt
out=${OUT:-logs/gpu} device=${DEVICE:-cuda} failed=0
read -ra network <<<"${NETWORK:---depth 28 --width 10}"
read -ra setting <<<"${SETTING---dtype bfloat16 --compile}"
all=("${network[@]}" --device "$device" --rounds "${ROUNDS:-15}")
if [ "$device" = cuda ] && ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    fail "gpu.sh: error: torch finds no GPU here (DEVICE=cpu tries this script without one)"
fi
mkdir -p "$out" || exit

part() { # NAME COMMAND...: what it prints goes to NAME.txt; done once
    local name=$1 started=$SECONDS left=$((ends - SECONDS)) state
    shift
    if [ -e "$out/$name.done" ]; then
        state="done before"
    elif [ $left -le 0 ]; then # which `timeout` would take for no limit
        state="no time left"
    elif timeout --foreground --kill-after=60 $left "$@" >"$out/$name.txt" 2>&1; then
        touch "$out/$name.done"
        state=finished
    else
        state="failed, see $out/$name.txt" failed=1
        if [ $SECONDS -ge $ends ]; then state="out of time"; fi
    fi
    printf '%-24s %4d s  %s\n' "$name" $((SECONDS - started)) "$state"
}

part tests "$python" -m pytest -q -p no:cacheprovider -m "not long" tests/optimizer/test_cuda.py \
    tests/optimizer/test_fast_paths.py tests/training/test_cuda.py
part optimizer_step "$python" benchmarks/optimizer_step.py "${all[@]}" --json "$out/optimizer_step.json"
train() { # NAME FLAGS...
    part "$1" "$python" benchmarks/train_throughput.py "${all[@]}" "${@:2}" --json "$out/$1.json"
}
for method in SGDG AdamG SGD; do
    train "train_$method" --optim_method $method "${setting[@]}"
done
train train_float32 --optim_method SGDG

"$python" -c '
import json, sys
from pathlib import Path
out, commit = Path(sys.argv[1]), sys.argv[2]
figures = {path.stem: json.loads(path.read_text()) for path in sorted(out.glob("*.json"))}
texts = {path.stem: path.read_text()[-2000:] for path in sorted(out.glob("*.txt"))}
result = {"commit": commit, "figures": figures, "texts": texts}
Path(f"{out}.json").write_text(json.dumps(result, indent=1) + "\n")
' "$out" "$(git rev-parse HEAD 2>/dev/null)" && echo "all figures: $out.json"
exit $failed
