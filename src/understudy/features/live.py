"""What the frozen target says of a batch, computed when it is asked for.

    features = LiveFeatures(target, Needs(taps=frozenset({2, 6, 9}), last=True))(batch)

Documents that share a row must not see each other. The rows are therefore taken apart: each document becomes a row of its own,
documents of similar length go through the model together, padded at their end, and what comes out is put back into the packed
places. Under causal attention a row's beginning never sees its end, so no mask is needed, and the result is exact for every family
and every attention kernel (a packed mask would be dense, which shuts out causal kernels and computes T^2 scores per row).

What no tap and no last state needs is not run: the model ends at the highest tap, and the head never runs.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from understudy.core.errors import UserError
from understudy.core.records import Needs
from understudy.drafting.objective import Batch, Features
from understudy.target.stages import Stage
from understudy.target.target import Target

PASS_COST = 256  # padding tokens that cost as much as one more pass over the model

Ints = npt.NDArray[np.int64]


class LiveFeatures:
    """`source(batch) -> Features`, on the target's device and in its dtype. The user's model is not touched.

    `needs.taps` and `needs.exit` (its output is a tap like any other) give `Features.taps`, `needs.last` gives `Features.last`;
    padding is zeros. Logits are not kept: `target.head` makes them of `last`, in chunks. Raises UserError for a tap that the
    model does not have, and for a document longer than its context.
    """

    def __init__(self, target: Target, needs: Needs) -> None:
        assert not needs.logits, "features hold no logits: ask for the last hidden state and apply the head in chunks"
        exits = frozenset() if needs.exit is None else frozenset({needs.exit})
        self.target, self.needs = target, Needs(taps=needs.taps | exits, last=needs.last)
        if wrong := sorted(tap for tap in self.needs.taps if not 0 <= tap <= target.layers):
            raise UserError(
                f"there is no tap {wrong[0]}: {target.name or 'the target'} has taps 0 (embeddings) to {target.layers}"
                " (output of its last layer)"
            )
        self._kept: dict[int, Tensor] = {}  # tap -> [N, M, D] of the pass at hand
        end = target.layers if needs.last else max(self.needs.taps, default=0)
        self._body = self._decoder(max(end, 1))

    def _decoder(self, end: int) -> Any:
        """The first `end` layers inside the model's own decoder class, with the model's own attention, hooked at the taps."""
        stage = Stage(self.target.decoder, 0, end)
        stage.body.config._attn_implementation = self.target.config._attn_implementation
        for tap in self.needs.taps:
            if tap == 0:  # what enters the first layer: some families scale embeddings before
                stage.body.layers[0].register_forward_pre_hook(self._keep_input, with_kwargs=True)
            else:
                stage.body.layers[tap - 1].register_forward_hook(self._keeper(tap))
        return stage.body

    def _keep_input(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._kept[0] = args[0] if args else kwargs["hidden_states"]

    def _keeper(self, tap: int) -> Any:
        def keep(_: nn.Module, __: object, out: Any) -> None:
            self._kept[tap] = out if isinstance(out, Tensor) else out[0]

        return keep

    def __call__(self, batch: Batch) -> Features:
        """Features of `batch`: taps and last states [B, T, D], ordinary tensors without a gradient."""
        batch = batch.to(self.target.device)
        # features are inputs of a graph: inference tensors could not be, and an outer autocast would change the target's numbers
        with (
            torch.inference_mode(False),
            torch.no_grad(),
            torch.autocast(self.target.device.type, enabled=False),
        ):
            return self._features(batch)

    def _features(self, batch: Batch) -> Features:
        rows, columns = batch.ids.shape
        starts, lengths = _documents(batch)
        if lengths.size and lengths[0] > self.target.context:
            raise UserError(
                f"a document has {lengths[0]} tokens, the target's context is {self.target.context}: cut it shorter"
            )
        wanted: list[int | None] = [*sorted(self.needs.taps), *([None] if self.needs.last else [])]  # None = last
        out = {
            key: torch.zeros(rows * columns, self.target.hidden_size, dtype=self.target.dtype, device=batch.ids.device)
            for key in wanted
        }
        for group in _groups(lengths, rows * columns) if wanted else ():
            span = np.arange(lengths[group.start])
            places = (
                starts[group, None] + span
            )  # [N, M] into the flattened batch; beyond a document's end: somebody else's
            real = torch.from_numpy(span < lengths[group, None]).to(batch.ids.device)
            index = torch.from_numpy(np.where(span < lengths[group, None], places, starts[group, None]))
            index = index.to(batch.ids.device)
            hidden = self._body(input_ids=batch.ids.flatten()[index], use_cache=False).last_hidden_state
            for key in wanted:
                states = hidden if key is None else self._kept.pop(key)
                out[key][index[real]] = states.to(batch.ids.device)[real]
        shaped = {key: states.view(rows, columns, -1) for key, states in out.items()}
        return Features(batch, {tap: shaped[tap] for tap in sorted(self.needs.taps)}, shaped.get(None))


def _documents(batch: Batch) -> tuple[Ints, Ints]:
    """(first token in the flattened batch, length) of every document, longest first."""
    documents, positions = batch.documents.cpu().numpy(), batch.positions.cpu().numpy()
    edge = np.ones_like(documents, dtype=bool)
    edge[:, 1:] = documents[:, 1:] != documents[:, :-1]
    starts = np.flatnonzero(edge)
    lengths = np.diff(starts, append=documents.size)
    real = documents.reshape(-1)[starts] >= 0
    starts, lengths = starts[real], lengths[real]
    assert not positions.reshape(-1)[starts].any(), "positions count from 0 inside every document"
    order = np.argsort(-lengths, kind="stable")
    return starts[order], lengths[order]


def _groups(lengths: Ints, most: int) -> list[slice]:
    """Which documents (longest first) share a pass: the cheapest partition into runs, each of at most `most` padded tokens.

    A run costs its padded tokens plus `PASS_COST`; best[j] = min over i of best[i] + cost(i, j), solved from left to right.
    """
    count = len(lengths)
    best, cut = np.zeros(count + 1), np.zeros(count + 1, dtype=np.int64)
    for j in range(1, count + 1):
        padded = (j - np.arange(j)) * lengths[:j]  # of the runs [i, j), whose longest document is the first
        cost = np.where(padded <= most, best[:j] + padded + PASS_COST, np.inf)
        cut[j] = cost.argmin()
        best[j] = cost[cut[j]]
    groups = []
    while count:
        groups.append(slice(int(cut[count]), count))
        count = int(cut[count])
    return groups[::-1]
