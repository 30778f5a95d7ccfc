# Sourced by the table scripts, which set $table, the lists $models and $datasets, $epochs and $drops, and then call
# `sweep "$@"`. The lists can be narrowed by environment variables: see the header of such a script.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

usage_error() {
    echo "${0##*/}: error: $1" >&2
    exit 2
}

# ------------------------------------------------------------------------------------------------------ the cells

# read_list NAME DEFAULT WHAT PATTERN: the words of the environment variable NAME into the array `list`.
read_list() {
    local text=${!1-$2} word seen=" "
    read -rd '' -a list <<<"$text" || true # read fails at the end of the text, after it has filled the array
    [ "${#list[@]}" -gt 0 ] || usage_error "$1 is empty: name $3, or unset it for all"
    for word in "${list[@]}"; do
        [[ $word =~ ^($4)$ ]] || usage_error "$1: $word is not known; name $3"
        [[ $seen != *" $word "* ]] || usage_error "$1 names $word twice: two runs would write to one directory"
        seen+="$word "
    done
}

read_settings() {
    local model list
    read_list MODELS "$models" "networks such as vgg-13 or wrn-28-10" \
        'vgg-(11|13|16|19)|wrn-[1-9][0-9]{0,3}-[1-9][0-9]{0,3}'
    model_list=("${list[@]}")
    for model in "${model_list[@]}"; do
        IFS=- read -r _ depth width <<<"$model"
        [[ -z $width || ($depth -ge 10 && $((depth % 6)) -eq 4) ]] ||
            usage_error "MODELS: $model is not known; a Wide ResNet has depth 6n+4, such as 10, 16 or 28"
    done
    read_list DATASETS "$datasets" "data sets out of $datasets" "${datasets// /|}"
    dataset_list=("${list[@]}")
    read_list METHODS "SGD SGDG AdamG" "methods out of SGD SGDG AdamG" "SGD|SGDG|AdamG"
    method_list=("${list[@]}")
    read_list SEEDS "0 1 2 3 4" "whole numbers from 0" "0|[1-9][0-9]{0,17}"
    seed_list=("${list[@]}")
    epochs=${EPOCHS-$epochs}
    [[ $epochs =~ ^[1-9][0-9]{0,5}$ ]] || usage_error "EPOCHS must be a whole number of at least 1, got '$epochs'"
    jobs=${JOBS-}
    [[ -z ${JOBS+set} || $jobs =~ ^[1-9][0-9]{0,3}$ ]] ||
        usage_error "JOBS must be a whole number of at least 1, got '$jobs'"
}

check_flags() { # what the sweep decides itself would land in a wrong directory
    local flag
    for flag in "${flags[@]}"; do
        case ${flag%%=*} in
        --model | --depth | --width | --dataset | --optim_method | --seed)
            usage_error "${flag%%=*} after -- would override the sweep: set MODELS, DATASETS, METHODS or SEEDS" ;;
        --epochs | --epoch_step) usage_error "${flag%%=*} after -- would override the sweep: set EPOCHS" ;;
        --save | --resume) usage_error "${flag%%=*} after -- would override the sweep, which names the directories" ;;
        esac
    done
}

epoch_step() { # the protocol's drops for this number of epochs, halves rounded up, as [60,120,160]
    local share drop last=0 text=
    for share in "${drops[@]}"; do
        drop=$(((epochs * share + 500) / 1000))
        if [ "$drop" -gt "$last" ] && [ "$drop" -lt "$epochs" ]; then
            text+=${text:+,}$drop
            last=$drop
        fi
    done
    echo "[$text]"
}

quoted() { # words as one line of shell, with quotes only where they are needed
    local word line=
    for word in "$@"; do
        if [[ ! $word =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]]; then word=${word@Q}; fi
        line+="${line:+ }$word"
    done
    echo "$line"
}

model_flags() { # MODEL
    local depth width
    IFS=- read -r _ depth width <<<"$1"
    if [ -n "$width" ]; then echo "--model resnet --depth $depth --width $width"; else echo "--model vgg$depth"; fi
}

make_cells() { # the arrays `directories` and `commands`, seed by seed, so that a table fills evenly
    local seed dataset model method directory start cell rest
    start=$(quoted "$python" main.py)
    rest=$(quoted --epochs "$epochs" --epoch_step "$(epoch_step)" --resume auto "${flags[@]}")
    for seed in "${seed_list[@]}"; do for dataset in "${dataset_list[@]}"; do
        for model in "${model_list[@]}"; do for method in "${method_list[@]}"; do
            directory=logs/$table/$dataset/$model/$method/seed$seed
            directories+=("$directory")
            cell="$(model_flags "$model") --dataset $dataset --optim_method $method --seed $seed --save $directory"
            commands+=("$start $cell $rest")
        done; done
    done; done
}

# ------------------------------------------------------------------------------------------------------- the runs

finished() { # INDEX: without starting Python, which takes seconds
    local log=${directories[$1]}/log.txt checkpoint=${directories[$1]}/checkpoint.pt
    [ -f "$log" ] && [ "$(grep -c '^json_stats: {.*}$' "$log")" -eq "$epochs" ] || return 1
    # A kill may fall between the last line and the last checkpoint; without one the log alone was kept.
    [ ! -f "$checkpoint" ] || [ ! "$log" -nt "$checkpoint" ]
}

choose_devices() { # the array `gpus`, $jobs, and on the CPU each run's share of the cores
    gpus=()
    if [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then
        IFS=, read -ra gpus <<<"${CUDA_VISIBLE_DEVICES##-*}" # -1: none
    elif command -v nvidia-smi >/dev/null; then
        mapfile -t gpus < <(nvidia-smi -L 2>/dev/null | sed -n 's/^GPU \([0-9]*\):.*/\1/p')
    fi
    [ -n "$jobs" ] || jobs=$((${#gpus[@]} > 0 ? ${#gpus[@]} : 1))
    if [ "${#gpus[@]}" -eq 0 ] && [ -z "${OMP_NUM_THREADS-}" ]; then
        export OMP_NUM_THREADS=$(($(nproc) > jobs ? $(nproc) / jobs : 1))
    fi
}

say() { # also to a terminal that is gone, as after a lost connection: the runs must still be asked and waited for
    echo "$1" 2>/dev/null || true
}

# worker SLOT: takes runs that no other worker has taken, until none is left or it is told to stop. main.py answers
# the first SIGTERM by a checkpoint and the second by its end, so each one that comes here goes on exactly once.
worker() {
    local slot=$1 i code child="" asked=0 passed_on=0
    trap 'asked=$((asked + 1)); pass_on' TERM
    if [ "${#gpus[@]}" -gt 0 ]; then export CUDA_VISIBLE_DEVICES=${gpus[slot % ${#gpus[@]}]}; fi
    for i in "${!commands[@]}"; do
        if [ "$asked" -gt 0 ]; then return; fi
        if ! mkdir "$state/$i" 2>/dev/null; then # making a directory is atomic: one worker gets it
            if [ -d "$state/$i" ]; then continue; fi
            say "cannot write to $state: no more runs are started here" >&2
            return
        fi
        if [ "${#flags[@]}" -eq 0 ] && finished "$i"; then continue; fi
        say "$(date +%T) start    ${directories[i]}"
        if ! mkdir -p "${directories[i]}"; then
            echo 1 >"$state/$i/code"
            continue
        fi
        bash -c "exec ${commands[i]}" >>"${directories[i]}/output.txt" 2>&1 </dev/null &
        child=$!
        pass_on
        while # a signal ends `wait`, not the run
            code=0
            wait "$child" || code=$?
            kill -0 "$child" 2>/dev/null
        do :; done
        child=""
        if [ "$code" -ne 0 ] && [ "$asked" -eq 0 ]; then
            say "$(date +%T) failed   ${directories[i]}"
            echo "$code" >"$state/$i/code" || true # on a full disk the file is there, but empty
        elif finished "$i"; then
            say "$(date +%T) finished ${directories[i]}"
        else
            say "$(date +%T) stopped  ${directories[i]}"
        fi
    done
}

pass_on() {
    if [ -n "$child" ] && [ "$passed_on" -lt "$asked" ]; then
        passed_on=$asked
        kill -TERM "$child" 2>/dev/null || true
    fi
}

stop() { # SIGNAL
    stopped_by=$1
    kill -TERM "${workers[@]}" 2>/dev/null || true
    say "SIG$1: waiting for the runs to write their checkpoints (once more to end them at once)" >&2
}

run_cells() {
    local slot signal worker_pid
    mkdir -p "logs/$table"
    state=$(mktemp -d "logs/$table/.sweep.XXXXXX") # not in /tmp: a sweep goes on for longer than files may stay there
    trap 'rm -rf "$state"' EXIT
    stopped_by=""
    workers=()
    for signal in INT TERM HUP; do trap "stop $signal" "$signal"; done
    set -m # every worker in a process group of its own: Ctrl-C reaches this script only, which then asks them once
    for ((slot = 0; slot < jobs; slot++)); do
        worker "$slot" &
        workers+=($!)
    done
    if [ -n "$stopped_by" ]; then kill -TERM "${workers[@]}" 2>/dev/null || true; fi # it came while they started
    for worker_pid in "${workers[@]}"; do
        while kill -0 "$worker_pid" 2>/dev/null; do wait "$worker_pid" || true; done
    done
}

# ----------------------------------------------------------------------------------------------------- the report

count_finished() {
    local i count=0
    for i in "${!commands[@]}"; do
        if finished "$i"; then count=$((count + 1)); fi
    done
    echo "$count"
}

same_command() { # as the user has to type it again
    local name line=""
    for name in MODELS DATASETS METHODS SEEDS EPOCHS JOBS; do
        if [ -n "${!name+set}" ]; then line+="$name=$(quoted "${!name}") "; fi
    done
    if [ "${#flags[@]}" -gt 0 ]; then set -- -- "${flags[@]}"; else set --; fi
    echo "${line}bash $(quoted "$0" "$@")"
}

report() { # exit code: 0, 1 after a failure, 128 + signal
    local i output code failures=0 done_now
    for i in "${!commands[@]}"; do
        if [ ! -d "$state/$i" ] && [ -z "$stopped_by" ] && ! finished "$i"; then
            failures=$((failures + 1))
            say "not started: ${directories[i]} ($state cannot be written, or a worker was killed)" >&2
        fi
        if [ ! -f "$state/$i/code" ]; then continue; fi
        failures=$((failures + 1))
        output=${directories[i]}/output.txt
        code=$(cat "$state/$i/code")
        say "failed with exit code ${code:-unknown}: $output: $(tail -n 1 "$output" 2>&1)" >&2
    done
    done_now=$(count_finished)
    say "$done_now of ${#commands[@]} runs are finished, $failures failed"
    if [ "$done_now" -lt "${#commands[@]}" ]; then say "to continue: $again"; fi
    case $stopped_by in
    INT) return 130 ;; TERM) return 143 ;; HUP) return 129 ;;
    esac
    [ "$failures" -eq 0 ]
}

# ------------------------------------------------------------------------------------------------------ the sweep

sweep() {
    local print=no python jobs gpus again command
    flags=() directories=() commands=()
    while [ "$#" -gt 0 ]; do
        case $1 in
        -h | --help)
            sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"
            exit
            ;;
        --print) print=yes ;;
        --)
            shift
            flags=("$@")
            break
            ;;
        *) usage_error "$1 is not known: --print, --help, and after -- flags for main.py" ;;
        esac
        shift
    done
    read_settings
    check_flags
    again=$(same_command)
    cd "$root"
    source scripts/setup.sh >&2 # the commands of --print need the environment too, and standard output for themselves
    install_requirements requirements.txt >&2
    make_cells
    if [ "$print" = yes ]; then
        for command in "${commands[@]}"; do echo "cd $(quoted "$root") && $command"; done
        exit
    fi
    choose_devices
    echo "$(count_finished) of ${#commands[@]} runs are finished; $jobs at once, on ${#gpus[@]} GPUs (0: the CPU)"
    run_cells
    report
}
