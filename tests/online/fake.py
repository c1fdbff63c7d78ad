"""A drafter whose head learns, without a target: a LoRA head over random frozen weights, and cycles made by hand."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from understudy.core.records import Cycle, Proposal, Rows
from understudy.drafting.learning import LearnOptions, Trace
from understudy.drafting.lora import LoRALinear
from understudy.drafting.protocols import Drafter
from understudy.training.online.buffer import Batch, DVIRingBuffer


class Head(nn.Module):
    def __init__(self, weight: Tensor, r: int, seed: int) -> None:
        super().__init__()
        self.proj = LoRALinear(weight, r=r, generator=torch.Generator().manual_seed(seed))


class FakeDrafter(Drafter):
    """Follows the contract of a learning drafter: `Trace.hidden` is what its head projects."""

    def __init__(self, weight: Tensor, learning: LearnOptions | None = None, r: int = 8, seed: int = 0) -> None:
        super().__init__()
        self.steps = 4
        self.learning = learning or LearnOptions()
        self.drafter_head = Head(weight, r, seed)

    def head_logits(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self.drafter_head.proj(hidden)
        return logits

    def frozen_logits(self, hidden: Tensor) -> Tensor:
        return self.drafter_head.proj.frozen(hidden).float()


class World:
    """A verifier and a frozen draft head that partly agree: both linear in the state, the verifier's weights another matrix."""

    def __init__(
        self, vocab: int = 50, width: int = 16, seed: int = 0, distance: float = 0.6, scale: float = 1.0
    ) -> None:
        self.random = torch.Generator().manual_seed(seed)
        self.vocab, self.width, self.scale = vocab, width, scale
        self.draft = torch.randn(vocab, width, generator=self.random)
        low_rank = torch.randn(vocab, 3, generator=self.random) @ torch.randn(3, width, generator=self.random)
        self.verify = self.draft + distance * low_rank

    def drafter(self, learning: LearnOptions | None = None, **options: int) -> FakeDrafter:
        return FakeDrafter(self.draft.clone(), learning, **options)

    def states(self, n: int) -> Tensor:
        return self.scale * torch.randn(n, self.width, generator=self.random)

    def fill(self, buffer: DVIRingBuffer, drafter: FakeDrafter, blocks: int, k: int = 4) -> float:
        """Draft and verify blocks of k greedily, into the buffer; the share of drafts accepted."""
        accepted = 0
        for _ in range(blocks):
            hidden = self.states(k)
            logits = hidden @ self.verify.T
            with torch.no_grad():
                drafts = drafter.head_logits(hidden).argmax(-1)
            m = int((drafts == logits.argmax(-1)).int().cumprod(0).sum())
            buffer.push_block(hidden, drafts.tolist(), logits, m)
            accepted += m
        return accepted / (blocks * k)

    def batch(self, n: int, drafter: FakeDrafter, store: str = "topk", topk: int = 20) -> Batch:
        buffer = self.buffer(n, store, topk)
        while buffer.size < n:
            self.fill(buffer, drafter, 8)
        return buffer.sample(n)

    def buffer(self, capacity: int, store: str = "topk", topk: int = 20, seed: int = 0) -> DVIRingBuffer:
        return DVIRingBuffer(capacity, self.width, self.vocab, store, topk, torch.float32, "cpu", seed)

    def cycle(self, drafter: FakeDrafter, k: int = 4, index: int = 1, sequence: int = 0) -> Cycle:
        """A verify pass as the engine hands it over: made in inference mode."""
        with torch.inference_mode():
            hidden = self.states(k + 1)
            drafts = drafter.head_logits(hidden[:k]).argmax(-1)
            return cycle(hidden[:k], drafts.tolist(), hidden @ self.verify.T, index=index, sequence=sequence)


def newest(buffer: DVIRingBuffer, n: int) -> Batch:
    """The last `n` samples, the newest first, without a trace of having looked."""
    return buffer._at((buffer.pushed - 1 - torch.arange(min(n, buffer.size))) % buffer.capacity)


def cycle(hidden: Tensor, drafts: Sequence[int], logits: Tensor, index: int = 1, sequence: int = 0) -> Cycle:
    """Greedy verification of a chain: hidden [K, D], drafts [K], raw verifier logits [K + 1, V]."""
    choices = logits.argmax(-1).tolist()
    accepted = 0
    while accepted < len(drafts) and drafts[accepted] == choices[accepted]:
        accepted += 1
    tokens = torch.tensor([0, *drafts])
    return Cycle(
        index=index,
        committed=choices[: accepted + 1],
        accepted=accepted,
        drafted=list(drafts),
        parents=None,
        choices=choices,
        rows=Rows(0, tokens, None, {}, None, None, logits),
        proposal=Proposal(tokens[1:], trace=Trace(hidden)) if drafts else None,
        stopped=False,
        kv_before={},
        kv_after={},
        sequence=sequence,
    )
