"""DFlash, slowly: one block at a time, one row, one head, in float64, with every mask asked pair by pair.

    objective = reference.objective(target, block_size=4)
    wanted = reference.slow(objective, documents)               # losses, weights, metrics and gradients by their definitions
    got = objective(reference.features(objective, reference.pack(documents, rows)))

Nothing is shared with the source but the weights, by name: taps and teacher logits come from the Hugging Face model's own forward on the
document, norms, rotation and softmax are written out.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import tiny
from dflash.equations import Weights, plain
from eagle3.reference import Document, V, document, features, gradients, pack, small
from understudy.drafters.dflash.config import DFlashConfig, DFlashObjectiveConfig
from understudy.drafters.dflash.drafter import DFlashDrafter
from understudy.drafters.dflash.layout import new_layout
from understudy.drafters.dflash.objective import DFlashObjective
from understudy.drafters.dflash.start import new_model
from understudy.target.target import Target

__all__ = [
    "Document",
    "V",
    "document",
    "features",
    "gradients",
    "objective",
    "pack",
    "plain",
    "slow",
    "small",
    "taught",
]
TAPS = [1, 3]
Anchor = tuple[int, int]  # document, token


def objective(target: Target, seed: int = 0, spread: float = 0.25, **options: Any) -> DFlashObjective:
    """A drafter with wide random weights, norms too, under training. `draft_steps` = all of a block unless given.

    `causal` = what a checkpoint may say besides what its layers' kinds do; `layer_types` too.
    """
    shape = {name: options.pop(name) for name in ("causal", "layer_types") if name in options}
    config = DFlashObjectiveConfig(**{"taps": TAPS, "num_draft_layers": 2, "block_size": 4, **options})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layout = new_layout(target, config)
        for name, value in shape.items():
            setattr(layout, name, list(value) if isinstance(value, tuple) else value)
        model = new_model(target, layout, config.train_embeddings)
        for weight in model.parameters():
            weight.data += spread * torch.randn(weight.shape)
    drafter = DFlashDrafter(target, model.to(target.dtype), DFlashConfig(steps=config.draft_steps))
    return DFlashObjective(drafter, config)


def taught(
    objective: DFlashObjective, rows: Sequence[Sequence[Document]], steps: int = 60, lr: float = 3e-3
) -> DFlashObjective:
    """The same objective after some steps on `rows`."""
    given = features(objective, pack(rows))
    optimizer = torch.optim.AdamW([p for p in objective.parameters() if p.requires_grad], lr=lr)
    for _ in range(steps):
        out = objective(given)
        assert out.divisor is not None
        optimizer.zero_grad()
        (out.loss / out.divisor).backward()
        optimizer.step()
    return objective


# The objective, draft by draft


@dataclass
class Slot:
    """Draft k of the block at token t of a document: x_{t+1+k}."""

    document: int
    t: int
    k: int
    loss: Tensor
    doubt: Tensor  # the confidence head's loss
    weight: float
    said: int  # the drafter's likeliest token
    best: int  # the target's
    true: int  # what the text has
    overlap: float
    confidence: tuple[float, float]  # the drafter's probability of `said` and of `best`
    out: Tensor


@dataclass
class Slow:
    slots: list[Slot]
    gap: float  # the least distance between the two best logits of anybody: below 1e-4, float32 may choose otherwise
    available: int  # tokens that decoding could ask for
    loss: Tensor
    divisor: float
    gradients: Weights
    by_place: dict[tuple[int, int, int], Slot] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.by_place = {(s.document, s.t, s.k): s for s in self.slots}

    def run(self, document: int, t: int, most: int, meant: str = "best") -> int:
        """Drafts of the block at t that are right in a row: the target's choice, or what stands in the text (`true`)."""
        k = 0
        while k < most and (slot := self.by_place.get((document, t, k))) is not None:
            if slot.said != getattr(slot, meant):
                break
            k += 1
        return k

    def metrics(self, steps: int, drafts: int, meant: str, kinds: Collection[str]) -> dict[str, tuple[float, float]]:
        """`steps`: of a cycle; `drafts`: of a block; `meant`: what counts as right; `kinds`: optional metrics that are there."""
        begins = [(s.document, s.t) for s in self.slots if s.k == 0]
        used = {(s.document, s.t + 1 + s.k) for s in self.slots}
        cycles = float(len(begins))
        found = {
            "tau_sim": (sum(1.0 + self.run(d, t, steps, meant) for d, t in begins), cycles),
            "coverage": (float(len(used)), float(self.available)),
        }
        for k in range(drafts):
            asked = [s for s in self.slots if s.k == k]
            tried = [s for s in asked if self.run(s.document, s.t, k, meant) == k]
            right, many = float(sum(s.said == getattr(s, meant) for s in tried)), float(len(asked))
            found |= {
                f"acc_{k}": (float(sum(s.said == getattr(s, meant) for s in asked)), many),
                f"ploss_{k}": (float(sum(s.loss.detach() for s in asked)), many),
                f"cond_acc_{k}": (right, float(len(tried))),
                f"joint_acc_{k}": (right, cycles),
                f"overlap_{k}": (sum(s.overlap for s in asked), many),
                f"confidence_loss_{k}": (float(sum(s.doubt.detach() for s in asked)), many),
            }
            for kind in ("overlap", "confidence_loss"):
                if kind not in kinds:
                    del found[f"{kind}_{k}"]
        return found


def asked(d: Document, t: int, k: int) -> bool:
    """Decoding asks draft k of the cycle that begins at t: that token, and all up to the draft, are the assistant's."""
    return t + 1 + k < len(d.tokens) and all(d.mask[t : t + 2 + k])


def divergence(config: DFlashObjectiveConfig, teacher: Tensor, logits: Tensor) -> Tensor:
    """KL of the target's law [V] from the drafter's, of logits."""
    ids = sorted(range(len(teacher)), key=lambda v: -float(teacher[v]))
    if not config.full_vocab:
        ids = ids[:64]
    p, log_q = teacher[ids].softmax(0), logits[ids].log_softmax(0)
    return sum((a * (a.log() - b) for a, b in zip(p, log_q, strict=True)), torch.zeros((), dtype=torch.float64))


def weights_of(config: DFlashObjectiveConfig, block: int, probabilities: list[float]) -> list[float]:
    """Of the drafts that are asked for, given the drafter's probability of what each is taught."""
    count = len(probabilities)
    if config.position_weights == "none":
        return [1.0] * count
    if config.position_weights == "exp":
        gamma = config.gamma or {8: 4.0, 16: 7.0}.get(block, 1 + 3 * block / 8)
        return [math.exp(-k / gamma) for k in range(count)]
    reached = [
        math.prod((1 - config.dpace_alpha) * q + config.dpace_alpha for q in probabilities[: k + 1])
        for k in range(count)
    ]
    return [sum(reached[k:]) for k in range(count)]


def slow(
    objective: DFlashObjective,
    documents: Sequence[Document],
    rows: int | None = None,
    anchors: Collection[Anchor] | None = None,
) -> Slow:
    """What `objective` has to say of `documents`, by the definitions; blocks of `rows` rows, at all anchors unless some are given."""
    drafter, config = objective.drafter, objective.config
    model, target, own = drafter.model, drafter.target, plain(drafter, grad=True)
    rows = model.config.block_size if rows is None else rows
    slots, gaps, available = list[Slot](), [math.inf], 0
    for n, d in enumerate(documents):
        states = [s.double() for s in tiny.hidden_states(target.model, d.tokens)]
        context = own.context([[states[tap][j] for tap in model.taps] for j in range(len(d.tokens))])
        law = tiny.logits(target.model, d.tokens).double()
        available += sum(asked(d, t, 0) for t in range(len(d.tokens)))
        for t in range(len(d.tokens)):
            if not asked(d, t, 0) or (anchors is not None and (n, t) not in anchors):
                continue
            outs = own.block(d.tokens[t], context, t, rows)[own.first :]
            made = []
            for k, out in enumerate(outs):
                if not asked(d, t, k):
                    break
                before, true, teacher = d.tokens[t + k], d.tokens[t + 1 + k], law[t + k]
                logits = own.logits(out, before)
                log_q, best = logits.log_softmax(0), int(teacher.argmax())
                q, label = log_q.detach().exp(), best if config.teacher == "target" else true
                loss = -log_q[label] if "ce" in config.loss_type else torch.zeros((), dtype=torch.float64)
                if "kl" in config.loss_type:
                    loss = loss + divergence(config, teacher, logits)
                overlap = sum(min(float(a), float(b)) for a, b in zip(teacher.softmax(0), q, strict=True))
                doubt = torch.zeros((), dtype=torch.float64)
                if config.confidence_head:
                    sure = own.confidence(out, before).sigmoid()
                    doubt = -(overlap * sure.log() + (1 - overlap) * (1 - sure).log())
                said = int(logits.argmax())
                made.append(Slot(n, t, k, loss, doubt, float(q[label]), said, best, true, overlap,
                                 (float(q[said]), float(q[best])), out.detach()))  # fmt: skip
                gaps += [float(x.detach().topk(2).values.diff().abs()) for x in (logits, teacher)]
            for slot, weight in zip(
                made, weights_of(config, model.config.block_size, [s.weight for s in made]), strict=True
            ):
                slot.weight = weight
            slots += made
    loss = sum((s.weight * (s.loss + s.doubt) for s in slots), torch.zeros((), dtype=torch.float64))
    trained = {name: own.w[name] for name, p in model.named_parameters() if p.requires_grad}
    found = (
        torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
        if loss.requires_grad
        else [None] * len(trained)
    )
    gradients = {
        name: torch.zeros_like(x) if g is None else g for (name, x), g in zip(trained.items(), found, strict=True)
    }
    return Slow(slots, min(gaps), available, loss.detach(), sum(s.weight for s in slots), gradients)
