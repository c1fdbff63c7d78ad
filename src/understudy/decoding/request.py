"""What one decoding request asks for."""

from __future__ import annotations

from typing import Literal

from understudy.core.config import Config, option


class DecodeParams(Config):
    """How a text is continued; the law itself is in `SamplingParams`."""

    max_new_tokens: int = option(256, "most new tokens; exact unless a stop comes first", "max-tokens", ge=1)
    steps: int | None = option(None, "most drafts in a row per cycle; default: the drafter's own", ge=0)
    adaptive: bool = option(False, "choose the draft length per cycle from running costs and acceptance")
    draft_sampling: Literal["argmax", "sample"] = option(
        "argmax",
        "drafts are the drafter's argmax and verified by matching, or drawn and verified by rejection on the recorded law",
    )
    prefill_chunk: int = option(512, "prompt tokens per pass", ge=1)
    detailed_timing: bool = option(False, "CUDA events around every section (adds a little overhead)")
