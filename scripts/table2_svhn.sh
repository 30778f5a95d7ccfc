#!/usr/bin/env bash
# The paper's table of SVHN: VGG-13, VGG-19, WRN-16-4 and WRN-22-8 with SGD, SGD-G and Adam-G, seeds 0 to 4:
# 60 runs, each in logs/table2/SVHN/<model>/<method>/seed<k>.
#
#     bash scripts/table2_svhn.sh [--print] [-- FLAGS FOR EACH main.py]
#
# The same command again skips what is finished, continues what was interrupted and tries again what failed.
# --print prints the commands instead, one per line. Environment variables narrow it; lists have spaces:
#
#     MODELS    vgg-N or wrn-D-K               "vgg-13 vgg-19 wrn-16-4 wrn-22-8"
#     DATASETS                                 "SVHN"
#     METHODS                                  "SGD SGDG AdamG"
#     SEEDS                                    "0 1 2 3 4"
#     EPOCHS    the learning rates drop after 37.5 and 75% of them: 160
#     JOBS      runs at once, by turns on the GPUs, or sharing the CPU's cores: one for each GPU, or 1
set -euo pipefail
script=$(realpath "$0")
cd "$(dirname "$script")/.."
source scripts/setup.sh
install_requirements requirements.txt
exec "$python" scripts/sweep.py "$script" \
    "vgg-13 vgg-19 wrn-16-4 wrn-22-8" "SVHN" 160 "0.375 0.75" "$@"
