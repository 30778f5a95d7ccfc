#!/usr/bin/env bash
# The paper's table of SVHN: VGG-13, VGG-19, WRN-16-4 and WRN-22-8 with SGD, SGD-G and Adam-G, seeds 0 to 4:
# 60 runs of 160 epochs, each in logs/table2/SVHN/<model>/<method>/seed<k>.
#
#     bash scripts/table2_svhn.sh [--print] [-- FLAGS FOR EACH main.py]
#
# All else is as `bash scripts/table1_cifar.sh --help` says; the rates drop after 37.5 and 75% of the epochs.
set -euo pipefail
script=$(realpath "$0")
cd "$(dirname "$script")/.."
source scripts/setup.sh
install_requirements requirements.txt
exec "$python" scripts/sweep.py "$script" \
    "vgg-13 vgg-19 wrn-16-4 wrn-22-8" "SVHN" 160 "0.375 0.75" "$@"
