"""DFlash's training objective: blocks at random anchors, each over the context strictly before its anchor.

    loss = sum_blocks sum_k w_k l(p_{A+k}, q_k) / sum w,        k = 0, 1, ... drafts

Draft k of the block at anchor A is x_{A+1+k}; p_{A+k} = the target's law after token A + k. l is the cross-entropy of the teacher's
token, the divergence KL(p || q), or their sum; w_k is 1, exp(-k / gamma), or D-PACE's (arXiv 2605.18810).

**The mask is exact.** A block begins only where decoding begins one, at a token that the assistant wrote, and draft k is asked for
only if the answer goes on that far. Blocks see nothing of each other, and nothing of the text from their anchor on but its token.

With a Markov head, draft k is corrected by the true token before it. A confidence head learns the detached chance that the target
accepts draft k, sum_v min(p(v), q(v)), by binary cross-entropy (DSpark, arXiv 2607.05147).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from understudy.core.records import Needs
from understudy.drafters.dflash.config import DFlashObjectiveConfig
from understudy.drafters.dflash.drafter import DFlashDrafter
from understudy.drafters.dflash.files import shape, write_drafter
from understudy.drafters.dflash.layout import servable
from understudy.drafting.objective import Batch, Features, Objective, Predictions, StepOutput
from understudy.drafting.slots import asked
from understudy.ops.chunks import chunked_sums
from understudy.ops.position_weights import dpace, exponential
from understudy.target.fingerprint import weights_hash

LIKELIEST = 64  # tokens of the target's law that kl compares unless it is asked for all
EVALUATION_SEED = 20240


@dataclass(frozen=True, slots=True)
class Blocks:
    """M blocks of K drafts, from any rows of a batch."""

    at: Tensor  # [M] int64 anchors in the flattened batch
    states: Tensor  # [M, K, H] normed states of the rows that draft
    asked: Tensor  # [M, K] bool
    before: Tensor  # [M, K] int64: the true token before each draft
    tokens: Tensor  # [M, K] int64: the true token there
    place: Tensor  # [M, K] int64: of the token before in the flattened batch, where the target's last state predicts the draft


class DFlashObjective(Objective):
    """Trains a `DFlashDrafter`."""

    def __init__(self, drafter: DFlashDrafter, config: DFlashObjectiveConfig) -> None:
        super().__init__()
        self.drafter: DFlashDrafter = drafter
        self.config = config
        self.needs = Needs(taps=frozenset(drafter.model.taps), last=True)
        drafter.requires_grad_(True)
        for attention in drafter.model.attentions:
            # what it could learn the norm of queries learns too, but for a rotary pair's two halves; and vLLM's CPU build norms the
            # context of all layers by the first layer's: only where all are equal does it draft as every other engine
            attention.k_norm.requires_grad_(False)
        frozen = {name: p for name, p in drafter.model.named_parameters() if not p.requires_grad}
        self._frozen = {name: weights_hash(p) for name, p in frozen.items()}

    def _anchors(self, wanted: Tensor) -> tuple[Tensor, Tensor]:
        """Anchors [B, N] of each row, in order, and which of them are real [B, N]: random ones of `wanted` [B, T], `--anchors` at most.

        In evaluation always the same ones.
        """
        if self.training:
            keys = torch.rand(wanted.shape, device=wanted.device)
        else:
            generator = torch.Generator().manual_seed(EVALUATION_SEED)
            keys = torch.rand(wanted.shape, generator=generator).to(wanted.device)
        most = min(self.config.anchors, int(wanted.sum(1).max()))
        chosen = keys.masked_fill(~wanted, 2.0).topk(most, dim=1, largest=False).indices.sort(1).values
        return chosen, wanted.gather(1, chosen)

    def _blocks(self, features: Features, anchors: Tensor, real: Tensor, wanted: Tensor) -> Blocks:
        """The blocks of K drafts at `anchors` [B, N] that are `real`; `wanted` [K, B, T]."""
        model, batch, drafts = self.drafter.model, features.batch, len(wanted)
        taps = torch.cat([features.taps[tap] for tap in model.taps], -1)
        states = model.blocks(taps, batch, anchors, drafts + model.first)[real][:, model.first :]
        row = torch.arange(len(anchors), device=anchors.device)[:, None]
        at = (row * batch.ids.shape[1] + anchors)[real]
        steps = torch.arange(drafts, device=at.device)
        asks = wanted.flatten(1)[:, at].T
        # what is not asked for may lie outside the batch
        before = torch.where(asks, at[:, None] + steps, 0)
        ids = batch.ids.flatten()
        return Blocks(at, states, asks, ids[before], ids[torch.where(asks, before + 1, 0)], before)

    def _teacher(self, features: Features, place: Tensor) -> tuple[Tensor, Tensor]:
        """The target's logits [U, V] in fp32 after the tokens at `place` [..] of the flattened batch, and which of them belong where [..].

        Blocks overlap: each place is computed once.
        """
        assert features.last is not None
        places, which = place.unique(return_inverse=True)
        last = features.last.flatten(0, 1)[places]
        # outside autocast: the target's own numbers are what decoding compares with
        with torch.no_grad(), torch.autocast(last.device.type, enabled=False):
            return self.drafter.target.head(last).to(last.device).float(), which

    def _logits(self, states: Tensor, before: Tensor) -> tuple[Tensor, Tensor | None]:
        """(logits [.., K, V] in fp32, of confidence [.., K]) of drafts after the tokens `before`."""
        model = self.drafter.model
        logits, sure = model.logits(states), None
        if model.markov_head is not None:
            embedded = model.markov_head.embed(before)
            logits = logits + model.markov_head.correction(embedded)
            if model.confidence_head is not None:
                sure = model.confidence_head(states, embedded)
        return logits.float(), sure

    def _kl(self, log_q: Tensor, teacher: Tensor, which: Tensor) -> Tensor:
        """KL(p || q) [.., K] of the target's law p from the drafter's q; over its likeliest tokens, renormalised, or over all.

        log q [.., K, V]; `teacher`, `which` as from `_teacher`.
        """
        if not self.config.full_vocab:
            ids = teacher.topk(min(LIKELIEST, teacher.shape[-1]), -1).indices
            log_q, teacher = log_q.gather(-1, ids[which]).log_softmax(-1), teacher.gather(-1, ids)
        log_p = teacher.log_softmax(-1)
        p = log_p.exp()
        return (p * log_p).sum(-1)[which] - (p[which] * log_q).sum(-1)

    def _weights(self, probability: Tensor, asks: Tensor) -> Tensor:
        """[M, K]: how much each draft counts. `probability` [M, K]: the drafter's of the token taught, detached."""
        config = self.config
        if config.position_weights == "dpace":
            return dpace(probability, asks, config.dpace_alpha)
        if config.position_weights == "exp":
            return exponential(asks, config.gamma or 1 + 3 * self.drafter.model.config.block_size / 8)
        return asks.float()

    def forward(self, features: Features) -> StepOutput:
        config, batch, model = self.config, features.batch, self.drafter.model
        # rows of a block see each other: evaluation has as many as decoding, whatever was trained
        drafts = model.drafts if self.training else self.drafter.steps
        wanted = asked(batch, drafts)
        if not wanted[0].any():
            nothing = sum(p.float().sum() for p in self.parameters() if p.requires_grad) * 0.0
            return StepOutput(torch.as_tensor(nothing), wanted[0].sum(), {})
        anchors, real = self._anchors(wanted[0])
        found = self._blocks(features, anchors, real, wanted)
        # evaluation compares with the target's likeliest token, as decoding does
        taught = "kl" in config.loss_type or config.teacher == "target" or model.confidence_head is not None
        taught = taught or not self.training
        right = torch.zeros_like(found.asked)

        def sums(index: Tensor, states: Tensor, asks: Tensor, before: Tensor, tokens: Tensor, place: Tensor) -> Tensor:
            logits, sure = self._logits(states, before)
            law = self._teacher(features, place) if taught else None
            best = tokens if law is None else law[0].argmax(-1)[law[1]]
            label = best if config.teacher == "target" else tokens
            with torch.autocast(logits.device.type, enabled=False):
                log_q = logits.log_softmax(-1)
                cross = -log_q.gather(-1, label[..., None])[..., 0]
                loss = cross if "ce" in config.loss_type else torch.zeros_like(cross)
                if "kl" in config.loss_type:
                    assert law is not None
                    loss = loss + self._kl(log_q, *law)
                overlap = torch.zeros_like(cross)
                if law is not None and (sure is not None or not self.training):
                    overlap = torch.minimum(law[0].softmax(-1)[law[1]], log_q.detach().exp()).sum(-1)
            weight = self._weights((-cross.detach()).exp(), asks)
            total = (loss * weight).sum()
            if sure is not None:
                # weighted as the loss beside it: what one counts for the other does not depend on the weights
                doubt = F.binary_cross_entropy_with_logits(sure, overlap, reduction="none")
                total = total + (doubt * weight).sum()
                doubt = torch.where(asks, doubt.detach(), 0.0)
            hit = (logits.detach().argmax(-1) == best) & asks
            right[index] = hit
            parts = [torch.where(asks, x.detach(), 0.0).sum(0) for x in (loss, overlap)]
            parts.append(torch.zeros_like(parts[0]) if sure is None else doubt.sum(0))
            return torch.cat([total[None], weight.sum()[None], *parts])

        index = torch.arange(len(found.at), device=found.at.device)
        chunk = max(1, config.loss_chunk // drafts)
        flat = chunked_sums(sums, chunk, index, found.states, found.asked, found.before, found.tokens, found.place)
        total, weight, parts = flat[0], flat[1].detach(), flat[2:].detach().view(3, -1)
        metrics = self._metrics(found, parts, right, batch)
        return StepOutput(total, found.asked.sum(), metrics, weight)

    def _metrics(self, found: Blocks, parts: Tensor, right: Tensor, batch: Batch) -> dict[str, tuple[Tensor, Tensor]]:
        """Marginal, conditional and joint accuracy per draft, never mixed; simulated tau; the share of supervised tokens that was used."""
        loss, overlap, doubt = parts
        asks, cycles = found.asked, found.asked[:, 0].sum()
        hits = (right & asks)[:, : self.drafter.steps].long().cumprod(1).sum()
        supervised = asked(batch, 1)[0]
        used = torch.zeros(supervised.numel() + asks.shape[1], dtype=torch.bool, device=asks.device)
        used[(found.at[:, None] + torch.arange(asks.shape[1], device=asks.device))[asks]] = True
        metrics = {"tau_sim": (cycles + hits, cycles), "coverage": (used.sum(), supervised.sum())}
        before = asks[:, 0]
        for k in range(asks.shape[1]):
            tried, many = before & asks[:, k], asks[:, k].sum()
            before = tried & right[:, k]
            metrics |= {
                f"acc_{k}": (right[:, k].sum(), many),
                f"ploss_{k}": (loss[k], many),
                f"cond_acc_{k}": (before.sum(), tried.sum()),
                f"joint_acc_{k}": (before.sum(), cycles),
            }
            if not self.training:
                metrics[f"overlap_{k}"] = (overlap[k], many)
            if self.drafter.model.confidence_head is not None:
                metrics[f"confidence_loss_{k}"] = (doubt[k], many)
        return metrics

    # For reading

    @torch.no_grad()
    def _look(self, features: Features) -> tuple[Tensor, Tensor, dict[str, Tensor], Tensor]:
        """(slots [N] in the flattened batch, asked [K, N], what was said and meant there [K, N] by name, states [N, H]).

        Every slot where decoding could begin a cycle, in order; in groups of as many blocks as training takes.
        """
        batch, drafts = features.batch, self.drafter.steps
        wanted = asked(batch, drafts)
        count, parts = int(wanted[0].sum(1).max()), []
        order = (~wanted[0]).to(torch.int8).argsort(dim=1, stable=True)[:, :count]
        for anchors in order.split(self.config.anchors, 1) if count else ():
            found = self._blocks(features, anchors, wanted[0].gather(1, anchors), wanted)
            for piece in torch.arange(len(found.at), device=found.at.device).split(
                max(1, self.config.loss_chunk // drafts)
            ):
                parts.append(self._said(features, found, piece))
        if not parts:
            empty = torch.zeros(0, dtype=torch.int64, device=batch.ids.device)
            parts = [(empty, *(torch.zeros(0, drafts, device=empty.device) for _ in range(5)), empty[:, None])]
        at, asks, predicted, target, pred_conf, target_conf, states = (torch.cat(p) for p in zip(*parts, strict=True))
        by_place = at.argsort()
        said = {
            "predicted": predicted.long(),
            "target": target.long(),
            "pred_conf": pred_conf,
            "target_conf": target_conf,
        }
        return (
            at[by_place],
            asks[by_place].bool().T,
            {name: x[by_place].T for name, x in said.items()},
            states[by_place],
        )

    def _said(self, features: Features, found: Blocks, piece: Tensor) -> tuple[Tensor, ...]:
        logits, _ = self._logits(found.states[piece], found.before[piece])
        teacher, which = self._teacher(features, found.place[piece])
        q, best = logits.softmax(-1), teacher.argmax(-1)[which]
        conf, said = q.max(-1)
        meant = q.gather(-1, best[..., None])[..., 0]
        return found.at[piece], found.asked[piece], said, best, conf, meant, found.states[piece, 0]

    def predictions(self, features: Features) -> Predictions:
        slots, asks, said, states = self._look(features)
        return Predictions(slots, **said, asked=asks, hidden=states)

    def lengths(self, features: Features) -> Tensor:
        slots, asks, said, _ = self._look(features)
        ids = features.batch.ids.flatten()
        # the text itself says what was accepted: under a penalty, or at a near tie, the target's raw argmax need not
        steps = torch.arange(1, len(asks) + 1, device=ids.device)[:, None]
        text = ids[(slots + steps).clamp_max(len(ids) - 1)]
        hits = (said["predicted"] == text) & asks
        found = torch.zeros_like(ids)
        found[slots] = hits.long().cumprod(0).sum(0)
        return found.view_as(features.batch.ids)

    def servable(self) -> dict[str, str]:
        model = self.drafter.model
        return servable(model.config, model.embed_tokens is not None, model.mask_embedding is not None)

    def card(self) -> dict[str, Any]:
        return {"shape": shape(self.drafter.model), "frozen_weights": self._frozen}

    def save(self, folder: Path) -> None:
        write_drafter(self.drafter.model, folder)
