#!/usr/bin/env bash
# Which hidden states say most: similarity to the last one, and how well the model would speak from there. Writes a proposal and curves.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

if [ "$DEVICES" -eq 1 ]; then
  set -- --plot "$@"
fi
everywhere layers --model "$MODEL" --output-dir "$RUN/layers" --num-samples 32 ${CONVERSATIONS:+--train-data-path "$CONVERSATIONS"} "$@"
if [ "$DEVICES" -gt 1 ]; then # every device wrote its share; curves and proposal are made of all of them
  $UNDERSTUDY layers --output-dir "$RUN/layers" --aggregate --plot
fi
