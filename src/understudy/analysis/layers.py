"""How near each layer of the target is to what the target says in the end.

Step A: cosine similarity of the hidden state after every layer to the final one. Step B: what the target would say if it ended
after that layer: its hidden state through the final norm and the head (early exit, the "logit lens" of nostalgebraist, 2020), as
cross-entropy of the text's next token, as agreement with the argmax of the whole target, and as KL(whole target || early exit).

Both look at the states from which an answer's tokens are predicted: what drafting is about. Layers count as taps do: 0 = embeddings,
i = output of the i-th layer counted from 1, before the final norm. Layer L with norm and head is the target itself.

The target runs once per sample, and only sums are kept (`tally`), so memory does not grow with samples.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from understudy.analysis.tally import Floats, Tally
from understudy.core.errors import UserError
from understudy.core.records import Needs
from understudy.data.stream import Stream
from understudy.drafting.objective import Batch, Features
from understudy.features.live import LiveFeatures
from understudy.ops.divergences import forward_kl, log_law
from understudy.target.memory import memory_guard
from understudy.target.target import Target

MOST = 24  # layers that step B looks at by default
LOGITS = 2**24  # numbers of one chunk of logits; a few of such chunks exist at once


def candidates(layers: int, asked: Sequence[int] = ()) -> list[int]:
    """Layers for step B, ascending: those asked for, else all of 0 to L - 1, or `MOST` spread evenly over them in a deeper target.

    UserError for a layer that is not there.
    """
    if wrong := [layer for layer in asked if not 0 <= layer <= layers]:
        raise UserError(f"--layers {wrong[0]}: layers are 0 (embeddings) to {layers} (the last one's output)")
    if asked:
        return sorted(set(asked) - {layers})  # the last one is always there, as the target itself
    count = min(layers, MOST)
    return sorted({round(float(place)) for place in np.linspace(0, layers - 1, count)})


def share(stream: Stream, count: int) -> Iterator[Batch]:
    """This process's part of the first `count` samples (conversations) of a stream with one unpacked row per batch.

    Of n processes, process r gets samples r, r + n, ...: together they see exactly what one process would.
    """
    assert stream.batch_size == 1 and not stream.pack
    packed = iter(stream)
    for _ in range(stream.rank, count, stream.world_size):
        if (batch := next(packed, None)) is None:
            return
        yield Batch(*batch.tensors())


def statistics(layers: int, chosen: Sequence[int]) -> list[str]:
    """Names of what `measure` counts, with `chosen` layers in step B and the target itself, layer L."""
    cosines = [f"{kind}/{layer}" for kind in ("cosine", "cosine_last") for layer in range(layers + 1)]
    return [*cosines, *(f"{kind}/{layer}" for kind in ("ce", "agreement", "kl") for layer in (*chosen, layers))]


def measure(target: Target, batches: Iterable[Batch], chosen: Sequence[int]) -> Tally:
    """Steps A and B over `batches`, one sample each; rows of padding only are passed over.

    Raises UserError for a sample beyond the target's context, and where a state is not finite.
    """
    source = LiveFeatures(target, Needs(taps=frozenset(range(target.layers + 1)), last=True))
    tally = Tally(statistics(target.layers, chosen))
    with torch.inference_mode():
        for batch in batches:
            with memory_guard(target):
                add(tally, target, source(batch), chosen)
    return tally


def add(tally: Tally, target: Target, features: Features, chosen: Sequence[int]) -> None:
    """Count one sample."""
    batch = features.batch
    seen = batch.mask[:, 1:] & (batch.positions[:, 1:] > 0)  # [1, T - 1]: the token after the state is one to predict
    count = int(seen.sum())
    if not count:
        return
    assert features.last is not None
    states = {layer: x[:, :-1][seen] for layer, x in features.taps.items()}  # [N, D] each
    last, tokens = features.last[:, :-1][seen], batch.ids[:, 1:][seen]
    sums = torch.cat([_cosines(states, last), _exits(target, states, last, tokens, chosen)])
    values: Floats = sums.numpy()
    if wrong := [name for name, value in zip(tally.names, values, strict=True) if not np.isfinite(value)]:
        raise UserError(
            f"{wrong[0]} is not finite: the target's hidden states overflow in {str(target.dtype).removeprefix('torch.')};"
            " take --dtype bfloat16 or float32"
        )
    tally.add(values, count)


def _cosines(states: dict[int, Tensor], last: Tensor) -> Tensor:
    """Sums over N of the cosine of each layer to the last layer's output, then to the state after the final norm: [2 (L + 1)]."""
    sums = []
    for final in (states[max(states)], last):
        direction = F.normalize(final.float(), dim=-1)
        sums += [_total((F.normalize(states[i].float(), dim=-1) * direction).sum(-1)) for i in sorted(states)]
    return torch.stack(sums)


def _exits(target: Target, states: dict[int, Tensor], last: Tensor, tokens: Tensor, chosen: Sequence[int]) -> Tensor:
    """Sums over N of cross-entropy, agreement and KL, for `chosen` and the target itself: [3 (C + 1)], nats."""
    total = torch.zeros(3, len(chosen) + 1, dtype=torch.float64)
    rows = max(1, LOGITS // target.vocab_size)
    for start in range(0, len(last), rows):
        here = slice(start, start + rows)
        whole = log_law(_logits(target, last[here]))
        for column, layer in enumerate((*chosen, target.layers)):
            law = whole
            if layer != target.layers:
                law = log_law(_logits(target, target.norm(states[layer][here])))
            total[0, column] -= _total(law.gather(-1, tokens[here, None]))
            total[1, column] += _total(law.argmax(-1) == whole.argmax(-1))
            total[2, column] += _total(forward_kl(whole, law))
    return total.flatten()


def _total(x: Tensor) -> Tensor:
    """Sum in float64, on the CPU: not every accelerator has that."""
    return x.cpu().sum(dtype=torch.float64)


def _logits(target: Target, hidden: Tensor) -> Tensor:
    return target.head(hidden).to(target.device)  # under a device map the head may be elsewhere
