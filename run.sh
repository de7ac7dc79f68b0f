#!/usr/bin/env bash
# Trains on what this machine has: all GPUs (DDP), or one, or the CPU. With the Python environment active:
#
#   ./run.sh                                            Collatz; type `stop` or `status` while it trains
#   ./run.sh recipes/gpt2_wikitext.py --preset quick    any recipe, with any flags
#
# docs/launch.md has the other launches.
set -euo pipefail
root=$(dirname "$0")
recipe=$root/recipes/collatz.py
case ${1:-} in
*.py)
    recipe=$1
    shift
    ;;
esac
gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
if [ "$gpus" -gt 1 ]; then
    exec accelerate launch --config_file "$root/accelerate_configs/ddp.yaml" --num_processes "$gpus" "$recipe" "$@"
fi
exec python "$recipe" "$@" # the same process: signals and the keyboard reach the run
