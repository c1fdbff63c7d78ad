"""Which target a drafter was made for: a fingerprint of architecture and weights that does not depend on name, path or dtype."""

from __future__ import annotations

import hashlib
import json

import torch
from torch import Tensor

from understudy.core.errors import UserError
from understudy.target.target import Target

SAMPLES = 64  # values of every parameter that go in
IGNORED = ("_name_or_path", "transformers_version", "use_cache", "dtype", "torch_dtype")


def places(count: int) -> list[int]:
    """Where to look into `count` values: `SAMPLES` of them, evenly, first and last included."""
    picked = min(SAMPLES, count)
    return [i * (count - 1) // max(picked - 1, 1) for i in range(picked)]


def fingerprint(target: Target) -> str:
    """16 hex digits. Values go in as bfloat16: the same weights have one fingerprint in float32 and in bfloat16.

    In float16 they may have another, because it rounds otherwise. UserError where weights are not in memory.
    """
    config = {key: value for key, value in target.config.to_dict().items() if key not in IGNORED}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, parameter in target.model.named_parameters():
        if parameter.device.type == "meta":
            raise UserError(
                "weights that are offloaded cannot be told apart: keep them in memory to train or load a drafter"
            )
        digest.update(f"{name} {tuple(parameter.shape)}".encode() + _sampled(parameter))
    return digest.hexdigest()[:16]


def weights_hash(weights: Tensor) -> str:
    """16 hex digits that tell these weights from others, as `fingerprint` tells targets."""
    return hashlib.sha256(f"{tuple(weights.shape)}".encode() + _sampled(weights)).hexdigest()[:16]


def _sampled(weights: Tensor) -> bytes:
    values = weights.detach().flatten()
    at = torch.tensor(places(values.numel()), device=values.device)
    return values[at].to(torch.bfloat16).cpu().contiguous().view(torch.uint8).numpy().tobytes()


def check_made_for(
    found: object, target: Target, what: str, anyway: bool, insist: str = "any_target=true to draft with it"
) -> None:
    """UserError if `found`, the fingerprint that `what` was made for (None = it does not say), is another target's.

    `insist`: how the user says `anyway` here, and what happens then.
    """
    if found is None or anyway or found == fingerprint(target):
        return
    raise UserError(
        f"{what} was trained for another target than {target.name or 'this one'} (other weights, or float16); train it anew, or"
        f" give {insist} all the same"
    )
