"""EAGLE-3's training-time test, slowly: every document by itself, every slot, every step of its chain, in float64.

    objective = reference.objective(target, norm_output=True)
    wanted = reference.slow(objective, documents)               # losses, counts, metrics and gradients by their definitions
    got = objective(reference.features(objective, reference.pack(documents, rows)))

Nothing is shared with the source but the weights, by name: taps and teacher logits come from the Hugging Face model's own forward on the
document, norms, rotation and softmax are written out.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor

import tiny
from understudy.drafters.eagle3.config import Eagle3Config, Eagle3ObjectiveConfig
from understudy.drafters.eagle3.drafter import Eagle3Drafter
from understudy.drafters.eagle3.layout import new_layout
from understudy.drafters.eagle3.objective import Eagle3Objective
from understudy.drafters.eagle3.start import new_model
from understudy.drafting.objective import Batch, Features
from understudy.features.live import LiveFeatures
from understudy.target.target import Target

Weights = dict[str, Tensor]
TAPS = [0, 1, 3]
V = 5  # so few tokens that a random drafter is right now and then


@cache
def small() -> Target:
    """A target with a vocabulary of `V`."""
    return Target(tiny.fresh_model("llama", vocab_size=V), name="small")


@dataclass(frozen=True)
class Document:
    tokens: list[int]
    mask: list[bool]


def document(length: int, mask: str | None = None, seed: int = 0) -> Document:
    """`mask` such as "..##.#", one sign per token; None = the second half."""
    tokens = random.Random(f"document {seed}").choices(range(V), k=length)
    return Document(
        tokens, [i >= length // 2 for i in range(length)] if mask is None else [sign == "#" for sign in mask]
    )


def pack(rows: Sequence[Sequence[Document]], length: int | None = None) -> Batch:
    """Documents row by row, padded at their end to `length` or the longest row."""
    length = length or max(sum(len(d.tokens) for d in row) for row in rows)
    parts = []
    for row in rows:
        slots = [(t, m, n, p) for n, d in enumerate(row) for p, (t, m) in enumerate(zip(d.tokens, d.mask, strict=True))]
        parts.append(slots + [(0, False, -1, 0)] * (length - len(slots)))
    ids, mask, documents, positions = (torch.tensor([[slot[i] for slot in row] for row in parts]) for i in range(4))
    return Batch(ids, mask, documents, positions)


def objective(target: Target, seed: int = 0, spread: float = 0.25, **options: Any) -> Eagle3Objective:
    """A drafter with wide random weights, norms too, under training. `draft_steps` = `ttt_length` unless given."""
    options = {"taps": TAPS, "ttt_length": 3, **options}
    config = Eagle3ObjectiveConfig(**{"draft_steps": options["ttt_length"], **options})
    counts = torch.randint(0, 9, (target.vocab_size,), generator=torch.Generator().manual_seed(seed))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = new_model(target, config, new_layout(target, config), lambda: counts)
        for weight in model.parameters():
            weight.data += spread * torch.randn(weight.shape)
    drafter = Eagle3Drafter(target, model.to(target.dtype), Eagle3Config(steps=config.draft_steps))
    return Eagle3Objective(drafter, config)


def taught(
    objective: Eagle3Objective, rows: Sequence[Sequence[Document]], steps: int = 60, lr: float = 3e-3
) -> Eagle3Objective:
    """The same objective after some steps on `rows`."""
    given = features(objective, pack(rows))
    optimizer = torch.optim.AdamW([p for p in objective.parameters() if p.requires_grad], lr=lr)
    for _ in range(steps):
        out = objective(given)
        optimizer.zero_grad()
        (out.loss / out.count).backward()
        optimizer.step()
    return objective


def features(objective: Eagle3Objective, batch: Batch) -> Features:
    return LiveFeatures(objective.drafter.target, objective.needs)(batch)


def gradients(objective: Eagle3Objective, loss: Tensor) -> Weights:
    """By the weight's name in the checkpoint; weights that are not trained are left out."""
    named = {name: p for name, p in objective.drafter.model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {name: torch.zeros_like(p) if g is None else g for (name, p), g in zip(named.items(), found, strict=True)}


# The model, row by row


def rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight


def rotate(x: Tensor, position: int, theta: float) -> Tensor:
    """[heads, d], rotated to `position`."""
    half = x.shape[-1] // 2
    angle = position * theta ** (-torch.arange(half, dtype=torch.float64) / half)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)


class Model:
    """The equations of the draft model on one row at a time."""

    def __init__(self, weights: Weights, config: Any, embedding: Tensor) -> None:
        self.w, self.config, self.embedding = weights, config, embedding.double()
        self.eps, self.theta = config.rms_norm_eps, config.rope_parameters["rope_theta"]

    def fuse(self, taps: list[Tensor]) -> Tensor:
        """One [D] per tap -> the state [H]."""
        if self.config.fc_norm:
            taps = [rms(tap, self.w[f"fc_norm.{i}.weight"], self.eps) for i, tap in enumerate(taps)]
        joined = torch.cat(taps)
        if self.config.norm_before_fc:
            joined = rms(joined, self.w["input_norm.weight"], self.eps)
        return self.w["fc.weight"] @ joined

    def enter(self, token: int, state: Tensor, position: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(query [heads, d], key and value [kv heads, d], residual [H]) of one row."""
        normed = rms(state, self.w["midlayer.hidden_norm.weight"], self.eps)
        embedded = rms(self.embedding[token], self.w["midlayer.input_layernorm.weight"], self.eps)
        x = torch.cat([embedded, normed])
        q, k, v = ((self.w[f"midlayer.self_attn.{n}_proj.weight"] @ x).view(-1, self.config.head_dim) for n in "qkv")
        residual = normed if self.config.norm_before_residual else state
        return rotate(q, position, self.theta), rotate(k, position, self.theta), v, residual

    def leave(self, q: Tensor, keys: list[Tensor], values: list[Tensor], residual: Tensor) -> Tensor:
        """Attention of one row to the rows it sees, and the rest of the layer: [H]."""
        groups = q.shape[0] // keys[0].shape[0]
        joined = []
        for head in range(q.shape[0]):
            scores = torch.stack([q[head] @ key[head // groups] / math.sqrt(q.shape[1]) for key in keys])
            share = scores.softmax(0)
            joined.append(sum(share[i] * value[head // groups] for i, value in enumerate(values)))
        x = residual + self.w["midlayer.self_attn.o_proj.weight"] @ torch.cat(joined)  # type: ignore[arg-type]
        y = rms(x, self.w["midlayer.post_attention_layernorm.weight"], self.eps)
        gate, up, down = (self.w[f"midlayer.mlp.{n}_proj.weight"] for n in ("gate", "up", "down"))
        return x + down @ (torch.nn.functional.silu(gate @ y) * (up @ y))

    def chain(self, tokens: list[int], taps: list[list[Tensor]], t: int, steps: int) -> list[Tensor]:
        """The outputs [H] of the chain that begins at slot t, as far as the document goes: step k is given x_{t+1+k}."""
        true = [self.enter(tokens[j + 1], self.fuse(taps[j]), j) for j in range(t + 1)]
        keys, values = [row[1] for row in true], [row[2] for row in true]
        outs = [self.leave(true[t][0], keys, values, true[t][3])]
        for k in range(1, steps):
            if t + 1 + k >= len(tokens):
                break
            fed = rms(outs[-1], self.w["norm.weight"], self.eps) if self.config.norm_output else outs[-1]
            q, key, value, residual = self.enter(tokens[t + 1 + k], fed, t + k)
            keys, values = [*keys, key], [*values, value]
            outs.append(self.leave(q, keys, values, residual))
        return outs

    def logits(self, out: Tensor) -> Tensor:
        return self.w["lm_head.weight"] @ rms(out, self.w["norm.weight"], self.eps)


# The objective, slot by slot


@dataclass
class Slot:
    """One supervised (slot, step)."""

    document: int
    t: int
    k: int
    loss: Tensor
    counted: bool  # in the loss
    said: int  # the drafter's likeliest token
    best: int  # the target's, of its whole vocabulary
    true: int  # what the text has
    overlap: float
    confidence: tuple[float, float]  # the drafter's probability of `said` and of `best`
    out: Tensor

    @property
    def right(self) -> bool:
        return self.said == self.best


@dataclass
class Slow:
    slots: list[Slot]
    beyond: list[Slot]  # those of drafts that decoding makes and training does not unroll
    cycles: int  # slots where decoding can begin a cycle
    loss: Tensor
    gradients: Weights
    gap: float  # the least distance between the two best logits of anybody: below 1e-4, float32 may choose otherwise
    by_place: dict[tuple[int, int, int], Slot] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.by_place = {(s.document, s.t, s.k): s for s in [*self.slots, *self.beyond]}

    def run(self, document: int, t: int, most: int, text: bool = False) -> int:
        """Drafts of the chain at slot t that are right in a row: the target's choice, or with `text` what stands there."""
        k = 0
        while k < most and (slot := self.by_place.get((document, t, k))) is not None:
            if slot.said != (slot.true if text else slot.best):
                break
            k += 1
        return k

    def metrics(self, steps: int, drafts: int) -> dict[str, tuple[float, float]]:
        begins = [(s.document, s.t) for s in self.slots if s.k == 0]
        found = {"tau_sim": (sum(1.0 + self.run(d, t, min(steps, drafts)) for d, t in begins), float(self.cycles))}
        for k in range(steps):
            asked = [s for s in self.by_place.values() if s.k == k]
            tried = [s for s in asked if self.run(s.document, s.t, k) == k]
            right = float(sum(s.right for s in tried))
            found |= {
                f"acc_{k}": (float(sum(s.right for s in asked)), float(len(asked))),
                f"ploss_{k}": (
                    float(sum(s.loss.detach() for s in asked if s.counted)),
                    float(sum(s.counted for s in asked)),
                ),
                f"overlap_{k}": (sum(s.overlap for s in asked), float(len(asked))),
                f"cond_acc_{k}": (right, float(len(tried))),
                f"joint_acc_{k}": (right, float(self.cycles)),
            }
        return found


def asked(d: Document, t: int, k: int) -> bool:
    """Decoding asks step k of the chain at slot t: the token before every draft up to it, and that draft, are the assistant's."""
    return t + 2 + k < len(d.tokens) and all(d.mask[t + 1 : t + 3 + k])


def law_loss(config: Eagle3ObjectiveConfig, teacher: Tensor, log_q: Tensor, ids: list[int]) -> tuple[Tensor, Tensor]:
    """(loss, acceptance rate) of teacher logits [V] and log q [V_d]."""
    p, q = teacher.softmax(0)[ids], log_q.exp()
    overlap = sum((min(a, b) for a, b in zip(p, q, strict=True)), torch.zeros((), dtype=torch.float64))  # type: ignore[type-var]
    if config.loss_type == "tv":
        return 1 - overlap, overlap
    if config.loss_type == "lk":
        return -overlap.log(), overlap
    own = teacher[ids].log_softmax(0)  # the target's law among the tokens that the drafter can say
    return (own.exp() * ((own if config.loss_type == "kl" else 0) - log_q)).sum(), overlap


def slow(objective: Eagle3Objective, documents: Sequence[Document]) -> Slow:
    """What `objective` has to say of `documents`, by the definitions."""
    drafter, config = objective.drafter, objective.config
    model, target = drafter.model, drafter.target
    w = {name: p.detach().double().requires_grad_() for name, p in model.named_parameters()}
    plain = Model(w, model.config, target.embed_tokens.weight)
    ids = list(range(target.vocab_size)) if model.ids is None else model.ids.tolist()
    slots, gaps, cycles = list[Slot](), [math.inf], 0
    for n, d in enumerate(documents):
        states = [s.double() for s in tiny.hidden_states(target.model, d.tokens)]
        taps = [[states[tap][j] for tap in model.taps] for j in range(len(d.tokens))]
        teacher = tiny.logits(target.model, d.tokens).double()
        for t in range(len(d.tokens)):
            if not asked(d, t, 0):
                continue
            cycles += 1
            for k, out in enumerate(plain.chain(d.tokens, taps, t, max(config.ttt_length, drafter.steps))):
                if not asked(d, t, k):
                    break
                logits, law = plain.logits(out), teacher[t + 1 + k]
                log_q = logits.log_softmax(0)
                loss, overlap = law_loss(config, law, log_q, ids)
                said, best = ids[int(logits.argmax())], int(law.argmax())
                sure = float(log_q.detach()[ids.index(best)].exp()) if best in ids else 0.0
                slots.append(Slot(n, t, k, loss, best in ids or config.out_of_vocab == "keep", said, best, d.tokens[t + 2 + k],
                                  float(overlap.detach()), (float(log_q.detach().max().exp()), sure), out.detach()))  # fmt: skip
                gaps += [float(x.detach().topk(2).values.diff().abs()) for x in (logits, law)]
    slots, beyond = ([s for s in slots if (s.k < config.ttt_length) is within] for within in (True, False))
    loss = sum((config.ttt_decay**s.k * s.loss for s in slots if s.counted), torch.zeros((), dtype=torch.float64))
    trained = {name: w[name] for name, p in model.named_parameters() if p.requires_grad}
    if loss.requires_grad:
        found = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
    else:
        found = (None,) * len(trained)
    gradients = {
        name: torch.zeros_like(x) if g is None else g for (name, x), g in zip(trained.items(), found, strict=True)
    }
    return Slow(slots, beyond, cycles, loss.detach(), gradients, min(gaps))
