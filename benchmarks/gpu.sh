#!/usr/bin/env bash
# What the first half hour on a GPU is for, in one command: the tests that need one, the optimizers' and the
# training's speed, then the next unfinished run of WRN-28-10, until the minutes are over.
#
#     bash benchmarks/gpu.sh [minutes]                       (30 by default)
#
# A part that fails says so and stops no other. Text and JSON go to logs/gpu; the same command again skips the
# parts that are done there, and continues the runs. SIGTERM or Ctrl-C: the run that goes on writes its
# checkpoint, and no other part starts.
#
# Environment variables:
#     PYTHON    the interpreter; it has what requirements.txt and requirements-test.txt list (python3)
#     OUT       another folder than logs/gpu
#     RUNS      where the runs go (logs/published/whole-schedule)
#     DATA      flags that name the data ("--dataset CIFAR10"), as "--dataset folder --dataroot pictures"
#     NETWORK   flags that name the network ("--depth 28 --width 10")
#     BATCH     pictures in a step (128)
#     SETTING   flags of speed and precision ("--dtype bfloat16 --compile")
#     EPOCHS    flags of a shorter schedule (none: the paper's)
#     SEEDS     of the runs ("0 1 2")
#     ROUNDS    of each measurement (15)
#     DEVICE    cuda, or cpu to try this script
set -uo pipefail
ends=$((SECONDS + 60 * ${1:-30}))
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
python=${PYTHON:-python3} out=${OUT:-logs/gpu} runs=${RUNS:-logs/published/whole-schedule} device=${DEVICE:-cuda}
read -ra data <<<"${DATA:---dataset CIFAR10}"
read -ra network <<<"${NETWORK:---depth 28 --width 10}"
read -ra setting <<<"${SETTING---dtype bfloat16 --compile}"
read -ra epochs <<<"${EPOCHS:-}"
rounds=${ROUNDS:-15} batch=${BATCH:-128}
all=("${network[@]}" --batchSize "$batch" --device "$device")
mkdir -p "$out" || exit
failed=0 stopped= child=
trap 'stopped=yes; ${child:+kill $child}' TERM INT

wait_for() { # COMMAND...: a signal is handed on to it, and it is waited for all the same
    local code
    "$@" &
    child=$!
    wait $child
    code=$?
    while kill -0 $child 2>/dev/null; do
        wait $child
        code=$?
    done
    child=
    return $code
}

part() { # NAME COMMAND...: what it prints goes to NAME.txt; done once
    local name=$1 started=$SECONDS left=$((ends - SECONDS)) state
    shift
    if [ $stopped ]; then return; fi
    if [ -e "$out/$name.done" ]; then
        state="done before"
    elif [ $left -le 0 ]; then # which `timeout` would take for no limit
        state="no time left"
    elif wait_for timeout --kill-after=60 $left "$@" >"$out/$name.txt" 2>&1; then
        touch "$out/$name.done"
        state=finished
    elif [ $stopped ]; then
        state=stopped
    elif [ $SECONDS -ge $ends ]; then
        state="out of time"
    else
        state="failed, see $out/$name.txt" failed=1
    fi
    printf '%-24s %4d s  %s\n' "$name" $((SECONDS - started)) "$state"
}

speed() { # NAME FLAGS...: of training
    local name=$1
    shift
    part "$name" "$python" benchmarks/train_throughput.py "${all[@]}" --rounds "$rounds" \
        --json "$out/$name.json" "$@"
}

train() { # NAME FLAGS...: the next part of a run
    local code=0 minutes state left=$((ends - SECONDS - 20)) save=$runs/$1 # 20 seconds for the checkpoint
    shift
    if [ $stopped ] || [ $left -lt 10 ]; then return; fi
    mkdir -p "$save"
    minutes=$(printf %d.%02d $((left / 60)) $((left % 60 * 100 / 60)))
    wait_for "$python" main.py "${all[@]}" "${data[@]}" "${setting[@]}" "${epochs[@]}" "$@" \
        --save "$save" --resume auto --max_minutes "$minutes" >>"$save/output.txt" 2>&1 || code=$?
    state=$(tail -n 1 "$save/output.txt" | cut -c1-54)
    case $code in
    0 | 130 | 143) ;; # Ctrl-C in a terminal reaches main.py itself, too
    *) failed=1 state="failed, see $save/output.txt" ;;
    esac
    printf '%-24s %s\n' "${save#"$runs"/}" "$state"
}

part tests "$python" -m pytest -q -p no:cacheprovider -m "not long" tests/optimizer/test_cuda.py \
    tests/optimizer/test_fast_paths.py tests/training/test_cuda.py
part deterministic "$python" benchmarks/deterministic_cost.py "${all[@]}" "${setting[@]}" --rounds "$rounds" \
    --json "$out/deterministic.json"
part optimizer_step "$python" benchmarks/optimizer_step.py "${network[@]}" --device "$device" --rounds "$rounds" \
    --json "$out/optimizer_step.json"
for method in SGDG AdamG SGD; do
    speed "train_$method" --optim_method $method "${setting[@]}" --profile "$out/profile_$method"
done
speed train_float32 --optim_method SGDG
for seed in ${SEEDS:-0 1 2}; do
    for method in SGD SGDG AdamG; do
        train "$method/seed$seed" --optim_method $method --seed $seed
    done
    for method in SGDG AdamG; do
        train "$method-measured/seed$seed" --optim_method $method --select measured --seed $seed
    done
done
if [ $stopped ]; then exit 143; fi
exit $failed
