#!/usr/bin/env bash
# The target answers the questions itself: a drafter learns what it will be asked to draft. Killed, it goes on where it stopped.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

if [ -n "$CONVERSATIONS" ] && [ -z "$HELD_OUT" ]; then
  echo "error: CONVERSATIONS is given without HELD_OUT, a file of conversations to measure on" >&2
  exit 2
fi

regenerate() { everywhere data regenerate --model "$MODEL" --output-dir "$RUN/data" "$@"; }

regenerate ${CONVERSATIONS:+--train-data-path "$CONVERSATIONS"} "$@"
# held-out ones, which acceptance is measured on while training; --num-samples given to this script holds for them too
DEVICES=1 regenerate --split eval --num-samples 200 ${CONVERSATIONS:+--eval-data-path "$HELD_OUT"} "$@"
