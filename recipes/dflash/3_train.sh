#!/usr/bin/env bash
# Train on the target's own answers. `best` is the checkpoint that decodes best, measured while it trains.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

everywhere train dflash --model "$MODEL" --data-dir "$RUN/data" --output-dir "$RUN/train" "$@"
