#!/usr/bin/env bash
# The target answers the questions itself: a drafter learns what it will be asked to draft. Killed, it goes on where it stopped.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

everywhere data regenerate --model "$MODEL" --output-dir "$RUN/data" ${CONVERSATIONS:+--train-data-path "$CONVERSATIONS"} "$@"
