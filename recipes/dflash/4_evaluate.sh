#!/usr/bin/env bash
# What it gains: total, prefill and decode time, acceptance and its length, and where the time goes, beside transformers' own decoding.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

$UNDERSTUDY bench --model "$MODEL" --draft-model "$RUN/train" --compare --check --detailed-timing --output-dir "$RUN/bench" "$@"
