"""What was drafted and how it was judged, kept in a ring of fixed size (DVI, Bhansali and Heck, 2510.05421).

A slot holds the state that the head read, the drafted token, whether it was accepted, and the verifier's raw logits there: all of
them, or the K largest. With `topk` nothing of the vocabulary's width is kept or rebuilt from what is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from understudy.core.seeds import generator

Batch = dict[str, Tensor | None]  # the fields of `DVITrainSample`, each with a leading [n]

LIMIT = (
    65504.0  # the largest number of fp16: states and logits beyond it are kept as it, so that nothing becomes infinite
)


class DVITrainSample(NamedTuple):
    """One drafted position. Only accepted positions and the first reject are samples: what follows a reject is off the text."""

    hk: Tensor  # [D] float16, what the head projected
    token: int  # the draft
    reward: int  # 1 accepted, 0 first reject
    pos: int  # 1..m accepted, m + 1 first reject: place in its block
    z_phi: Tensor | None  # [V] raw verifier logits, if store=full
    z_idx: Tensor | None  # [K] int32 ids of the largest, in no order, if store=topk
    z_val: Tensor | None  # [K] their raw logits
    is_first_reject: bool


class DVIRingBuffer:
    """The last `capacity` samples, in preallocated tensors on `device`. Sampling has a random stream of its own."""

    def __init__(
        self,
        capacity: int,
        d_model: int,
        vocab_size: int,
        store: str,  # full | topk
        topk: int,  # K, cut to the vocabulary
        logits_dtype: torch.dtype,  # float16 | float32
        device: torch.device | str,
        seed: int = 0,
    ) -> None:
        assert store in ("full", "topk"), store
        self.capacity, self.vocab_size, self.store = capacity, vocab_size, store
        self.topk = min(topk, vocab_size)
        self.device = torch.device(device)
        self.size = 0
        self.pushed = 0  # samples ever; the next goes to slot `pushed % capacity`
        self._random = generator("cpu", seed, "replay")
        # By slot, on the CPU: neither sampled nor taken as unseen
        self._unseen = torch.zeros(capacity, dtype=torch.bool)
        self._hk = torch.zeros(capacity, d_model, dtype=torch.float16, device=self.device)
        self._meta = torch.zeros(
            capacity, 4, dtype=torch.int32, device=self.device
        )  # token, reward, pos, is_first_reject
        width = vocab_size if store == "full" else self.topk
        self._logits = torch.zeros(capacity, width, dtype=logits_dtype, device=self.device)
        self._ids = torch.zeros(capacity, width if store == "topk" else 0, dtype=torch.int32, device=self.device)

    @property
    def bytes_per_slot(self) -> int:
        return sum(t[0].numel() * t.element_size() for t in (self._hk, self._meta, self._logits, self._ids))

    def push_full(self, hk: Tensor, token: int, z_phi: Tensor, reward: int, pos: int, is_first_reject: bool) -> None:
        """Keep one sample with all verifier logits: hk [D], z_phi [V]."""
        assert self.store == "full"
        self._push(hk[None], [(token, reward, pos, int(is_first_reject))], z_phi[None])

    def push_topk(self, hk: Tensor, token: int, z_phi: Tensor, reward: int, pos: int, is_first_reject: bool) -> None:
        """Keep one sample with the K largest of the verifier logits: hk [D], z_phi [V]."""
        assert self.store == "topk"
        self._push(hk[None], [(token, reward, pos, int(is_first_reject))], z_phi[None])

    def push_block(self, hk: Tensor, tokens: Sequence[int], z_phi: Tensor, accepted: int) -> int:
        """Keep what a block of K drafts teaches: hk [K, D], tokens [K], z_phi [K or more, V]; the first `accepted` were right.

        That is the accepted drafts and the one after them. Returns how many samples it was.
        """
        count = min(accepted + 1, len(tokens))
        meta = [(token, int(i < accepted), i + 1, int(i == accepted)) for i, token in enumerate(tokens[:count])]
        if count:
            self._push(hk[:count], meta, z_phi[:count])
        return count

    def _push(self, hk: Tensor, meta: Sequence[tuple[int, int, int, int]], z_phi: Tensor) -> None:
        logits, ids = self._kept(z_phi.detach())
        hk = hk.detach().clamp(-LIMIT, LIMIT)
        rows = torch.tensor(meta, dtype=torch.int32)
        done = max(0, len(meta) - self.capacity)  # a block wider than the ring leaves its end
        while done < len(meta):
            slot = (self.pushed + done) % self.capacity
            count = min(len(meta) - done, self.capacity - slot)
            here, there = slice(slot, slot + count), slice(done, done + count)
            self._hk[here] = hk[there]
            self._meta[here] = rows[there]
            self._unseen[here] = True
            self._logits[here] = logits[there]
            if ids is not None:
                self._ids[here] = ids[there]
            done += count
        self.pushed += len(meta)
        self.size = min(self.pushed, self.capacity)

    def _kept(self, logits: Tensor) -> tuple[Tensor, Tensor | None]:
        """Raw logits [n, V] -> what is kept of them: (values [n, V or K], ids [n, K] or None)."""
        if self.store == "full":
            return logits.clamp(-LIMIT, LIMIT), None
        if self.topk == self.vocab_size:
            return logits.clamp(-LIMIT, LIMIT), torch.arange(self.vocab_size, device=logits.device).expand_as(logits)
        if logits.device.type == "cpu":  # numpy partitions four times as fast as torch.topk finds the K largest
            split = self.vocab_size - self.topk
            ids = torch.from_numpy(logits.float().numpy().argpartition(split, axis=1)[:, split:])
        else:
            ids = logits.topk(self.topk, sorted=False).indices
        return logits.gather(1, ids).clamp_(-LIMIT, LIMIT), ids

    def sample(self, n: int) -> Batch:
        """`n` different samples by chance (all of them if there are fewer)."""
        slots = torch.randperm(self.size, generator=self._random)[:n]
        self._unseen[slots] = False
        return self._at(slots)

    @property
    def unseen(self) -> int:
        """How many samples have been in no batch so far: neither of `sample` nor of `take_unseen`."""
        return int(self._unseen.sum())

    def take_unseen(self, n: int) -> Batch:
        """The last `n` of the unseen samples (all of them if there are fewer), the newest first. Each is given once."""
        newest = (self.pushed - 1 - torch.arange(self.size)) % self.capacity
        slots = newest[self._unseen[newest]][:n]
        self._unseen[slots] = False
        return self._at(slots)

    def _at(self, slots: Tensor) -> Batch:
        slots = slots.to(self.device)
        token, reward, pos, first = self._meta[slots].long().unbind(1)
        full = self.store == "full"
        logits = self._logits[slots]
        return {
            "hk": self._hk[slots],
            "token": token,
            "reward": reward,
            "pos": pos,
            "z_phi": logits if full else None,
            "z_idx": None if full else self._ids[slots],
            "z_val": None if full else logits,
            "is_first_reject": first.bool(),
        }
