#!/usr/bin/env bash
# Train on the target's own answers. `best` is the checkpoint that decodes best, measured while it trains.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

# the hidden states that 1_layers.sh proposed, if it was run; TAPS=2,4,6 takes others, TAPS= the default ones
if [ -z "${TAPS+given}" ] && [ -f "$RUN/layers/layers.json" ]; then
  TAPS=$RUN/layers
fi
everywhere train dflash --model "$MODEL" --data-dir "$RUN/data" --output-dir "$RUN/train" ${TAPS:+--taps "$TAPS"} "$@"
