"""What tells one tokenizer from another, and one chat template: 16 hex digits, the same in checkpoints, data and runs."""

from __future__ import annotations

import hashlib
import json
from typing import Any


def tokenizer_hash(tokenizer: Any) -> str | None:
    """Of a tokenizer's vocabulary; None without one."""
    return None if tokenizer is None else _hash(tokenizer.get_vocab())


def template_hash(tokenizer: Any) -> str | None:
    """Of a chat template; None without one."""
    template = None if tokenizer is None else tokenizer.chat_template
    return _hash(template) if template else None


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
