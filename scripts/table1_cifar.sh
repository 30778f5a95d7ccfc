#!/usr/bin/env bash
# The paper's table of CIFAR-10 and CIFAR-100: VGG-13, VGG-19, WRN-28-10 and WRN-40-10 with SGD, SGD-G and
# Adam-G, seeds 0 to 4: 120 runs, each in logs/table1/<dataset>/<model>/<method>/seed<k>.
#
#     bash scripts/table1_cifar.sh [--print] [-- FLAGS FOR EACH main.py]
#
# The same command again skips what is finished, continues what was interrupted and tries again what failed.
# --print prints the commands instead, one per line. Environment variables narrow it; lists have spaces:
#
#     MODELS    vgg-N or wrn-D-K               "vgg-13 vgg-19 wrn-28-10 wrn-40-10"
#     DATASETS  or digits, to try it           "CIFAR10 CIFAR100"
#     METHODS                                  "SGD SGDG AdamG"
#     SEEDS                                    "0 1 2 3 4"
#     EPOCHS    the learning rates drop after 30, 60 and 80% of them: 200
#     JOBS      runs at once, by turns on the GPUs, or sharing the CPU's cores: one for each GPU, or 1
set -euo pipefail
script=$(realpath "$0")
cd "$(dirname "$script")/.."
source scripts/setup.sh
install_requirements requirements.txt
exec "$python" scripts/sweep.py "$script" \
    "vgg-13 vgg-19 wrn-28-10 wrn-40-10" "CIFAR10 CIFAR100" 200 "0.3 0.6 0.8" "$@"
