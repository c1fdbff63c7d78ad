"""EAGLE-3's training objective: the training-time test (Li et al., 2025, section 3.2).

    loss = sum_k decay^k sum_t l(p_{t+1+k}, q_t^k) / N,    l = - sum_v p(v) log q(v) by default

q_t^k = what the drafter says at unrolled step k of the chain that begins at slot t, p_u = softmax of the target's logits after
token u, over the draft vocabulary. Slot t drafts x_{t+2+k}, given x_{t+1} and the target's states up to t.

**The mask is exact.** A chain begins at slot t only where decoding begins one: x_{t+1} is committed text of the assistant. Step k is
asked for only if the answer goes on that far. So (t, k) is supervised iff x_{t+1} .. x_{t+2+k} all belong to the mask and to one document.

Evaluation unrolls at least as many steps as decoding drafts, so that its simulated accept length can be compared with the measured one;
the loss has the same steps as in training.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from understudy.core.records import Needs
from understudy.drafters.eagle3.config import Eagle3ObjectiveConfig
from understudy.drafters.eagle3.drafter import Eagle3Drafter
from understudy.drafters.eagle3.files import shape, write_drafter
from understudy.drafters.eagle3.layout import servable
from understudy.drafters.eagle3.vocab import digest
from understudy.drafting import slots
from understudy.drafting.objective import Batch, Features, Objective, Predictions, StepOutput
from understudy.ops.chunks import chunked_sums
from understudy.target.fingerprint import weights_hash

SUMS = ("loss", "lossy", "right", "overlap")  # per step: summed loss, slots in it, hits, summed acceptance rate


def asked(batch: Batch, steps: int) -> Tensor:
    """[K, B, T] bool: decoding asks step k of the chain that begins at slot t, which is the slot before its last committed token."""
    before = batch.documents[:, 1:] == batch.documents[:, :-1]  # a document's first token has no slot before it
    return F.pad(slots.asked(batch, steps)[:, :, 1:] & before, (0, 1), value=False)


@dataclass(frozen=True, slots=True)
class Aligned:
    """Slots regrouped by teacher row: all steps that are taught by the target's law after token u stand together."""

    at: Tensor  # [N] the teacher rows u, in the flattened batch
    last: Tensor  # [N, D] the target's last hidden state there
    outs: Tensor  # [N, K, H] the drafter's output at step k of the chain that begins at slot u - 1 - k
    asked: Tensor  # [N, K] bool


def aligned(features: Features, outs: list[Tensor], wanted: Tensor) -> Aligned:
    """`outs` [K][B, T, H], `wanted` [K, B, T]: by teacher row, those that teach anything."""
    assert features.last is not None
    shifted = torch.stack(
        [F.pad(w[:, : -1 - k], (1 + k, 0)) if k + 1 < w.shape[1] else w & False for k, w in enumerate(wanted)], -1
    )
    by_row = shifted.flatten(0, 1)  # [B T, K]
    at = by_row.any(-1).nonzero()[:, 0]
    picked = [out.flatten(0, 1)[(at - 1 - k).clamp_min(0)] for k, out in enumerate(outs)]
    return Aligned(at, features.last.flatten(0, 1)[at], torch.stack(picked, 1), by_row[at])


class Eagle3Objective(Objective):
    """Trains an `Eagle3Drafter`."""

    def __init__(self, drafter: Eagle3Drafter, config: Eagle3ObjectiveConfig) -> None:
        super().__init__()
        self.drafter: Eagle3Drafter = drafter
        self.config = config
        self.needs = Needs(taps=frozenset(drafter.model.taps), last=True)
        drafter.requires_grad_(True)
        drafter.model.lm_head.requires_grad_(config.train_head)
        if drafter.model.embed_tokens is not None:
            drafter.model.embed_tokens.requires_grad_(False)
        frozen = {name: p for name, p in drafter.model.named_parameters() if not p.requires_grad}
        self._frozen = {name: weights_hash(p) for name, p in frozen.items()}

    @property
    def says(self) -> Tensor | None:
        return self.drafter.model.ids

    def _unroll(self, features: Features, steps: int) -> list[Tensor]:
        model = self.drafter.model
        taps = torch.cat([features.taps[tap] for tap in model.taps], -1)
        return model.unroll(taps, features.batch, steps, self.config.checkpoint_steps and self.training)

    def _teacher(self, last: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[C, D] -> (p over the draft tokens [C, V_d], log of their share of the whole law [C], argmax of the whole law [C])."""
        # outside autocast: the target's own numbers are what decoding compares with
        with torch.no_grad(), torch.autocast(last.device.type, enabled=False):
            logits = self.drafter.target.head(last).to(last.device).float()  # under a device map it is elsewhere
            best, ids = logits.argmax(-1), self.drafter.model.ids
            if ids is None:
                return logits.softmax(-1), torch.zeros_like(logits[:, 0]), best
            mine = logits[:, ids]
            return mine.softmax(-1), mine.logsumexp(-1) - logits.logsumexp(-1), best

    def _said(self, logits: Tensor) -> Tensor:
        """The tokens [..] that the drafter finds likeliest, of logits [.., V_d]."""
        best, ids = logits.argmax(-1), self.drafter.model.ids
        return best if ids is None else ids[best]

    @property
    def _overlaps(self) -> bool:
        """Whether the acceptance rate is computed: where it is the loss, and in evaluation. It costs as much as the loss itself."""
        return self.config.loss_type in ("tv", "lk") or not self.training

    def _losses(self, logits: Tensor, p: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [C, K, V_d], p [C, V_d], log of its share of the target's law [C] -> (loss [C, K], acceptance rate [C, K]).

        The acceptance rate is sum_v min(p(v), q(v)) over the whole law; zeros where it is not computed.
        """
        kind, overlap = self.config.loss_type, torch.zeros_like(logits[..., 0])
        if self._overlaps:
            whole, log_q = (p.log() + share[:, None])[:, None], logits.log_softmax(-1)
            least = torch.minimum(whole, log_q).logsumexp(
                -1
            )  # among logarithms laws that hardly meet still have a gradient
            overlap = least.exp()
            if kind == "tv":  # 1 - sum_v min(p, q) is half of |p - q|; outside the draft vocabulary q = 0
                return 1 - overlap, overlap
            if kind == "lk":
                return -least, overlap
        # - sum_v p(v) log q(v) = logsumexp(z) - p . z: no [C, K, V_d] besides the logits is kept
        cross = logits.logsumexp(-1) - torch.bmm(logits, p[..., None])[..., 0]
        if kind == "kl":
            cross = cross + torch.xlogy(p, p).sum(-1, keepdim=True)
        return cross, overlap

    def forward(self, features: Features) -> StepOutput:
        config, batch = self.config, features.batch
        steps = config.ttt_length if self.training else max(config.ttt_length, self.drafter.steps)
        wanted = asked(batch, steps)
        outs = self._unroll(features, steps)
        count = wanted[0].sum()
        divisor = (batch.documents >= 0).sum() if config.loss_normalizer == "all" else None
        if not count:
            return StepOutput(torch.stack([out.float().sum() for out in outs]).sum() * 0.0, count, {}, divisor)
        right = torch.zeros_like(wanted).flatten(1)
        t2d = self.drafter.model.t2d
        align = aligned(features, outs, wanted)

        def sums(at: Tensor, last: Tensor, outs: Tensor, asks: Tensor) -> Tensor:
            p, share, best = self._teacher(last)
            logits = self.drafter.model.logits(outs).float()
            hit = (self._said(logits.detach()) == best[:, None]) & asks
            rows, step = asks.nonzero(as_tuple=True)
            right[step, at[rows] - 1 - step] = hit[rows, step]
            with torch.autocast(logits.device.type, enabled=False):  # its products would be rounded to bf16
                loss, overlap = self._losses(logits, p, share)
            inside = asks if t2d is None or config.out_of_vocab == "keep" else asks & t2d[best][:, None]
            loss = torch.where(inside, loss, 0.0)
            overlap = torch.where(asks, overlap.detach(), 0.0)
            return torch.stack([loss.sum(0), inside.sum(0), hit.sum(0), overlap.sum(0)]).flatten()

        chunk = max(1, config.loss_chunk // steps)
        flat = chunked_sums(sums, chunk, align.at, align.last, align.outs, align.asked)
        found = dict(zip(SUMS, flat.view(len(SUMS), steps), strict=True))
        if not self._overlaps:
            del found["overlap"]
        decay = config.ttt_decay ** torch.arange(config.ttt_length, device=flat.device)
        metrics = self._metrics({name: x.detach() for name, x in found.items()}, right.view_as(wanted), wanted)
        return StepOutput((found["loss"][: config.ttt_length] * decay).sum(), count, metrics, divisor)

    def _metrics(self, found: dict[str, Tensor], right: Tensor, wanted: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """Marginal, conditional and joint accuracy per position, never mixed; simulated tau = 1 + the sum of the latter, as far as
        decoding drafts."""
        cycles = wanted[0].sum()
        before = wanted[0]
        metrics = {"tau_sim": (cycles + (right & wanted)[: self.drafter.steps].long().cumprod(0).sum(), cycles)}
        for k in range(len(wanted)):
            tried = before & wanted[k]
            before = tried & right[k]
            asks = wanted[k].sum()
            metrics |= {
                f"acc_{k}": (found["right"][k], asks),
                f"ploss_{k}": (found["loss"][k], found["lossy"][k]),
                f"cond_acc_{k}": (before.sum(), tried.sum()),
                f"joint_acc_{k}": (before.sum(), cycles),
            }
            if "overlap" in found:
                metrics[f"overlap_{k}"] = (found["overlap"][k], asks)
        return metrics

    @torch.no_grad()
    def _look(self, features: Features, steps: int) -> tuple[Tensor, dict[str, Tensor], list[Tensor]]:
        """(asked [K, B, T], what was said and meant there [K, B T] by name, outputs), for reading; logits in chunks."""
        wanted = asked(features.batch, steps)
        outs = self._unroll(features, steps)
        model, ids, align = self.drafter.model, self.drafter.model.ids, aligned(features, outs, wanted)
        size = wanted[0].numel()
        said = {
            name: torch.zeros(steps, size, dtype=torch.int64, device=wanted.device) for name in ("predicted", "target")
        }
        said |= {name: torch.zeros(steps, size, device=wanted.device) for name in ("pred_conf", "target_conf")}
        chunk = max(1, self.config.loss_chunk // steps)
        for at, last, states, asks in zip(
            *(x.split(chunk) for x in (align.at, align.last, align.outs, align.asked)), strict=True
        ):
            rows, step = asks.nonzero(as_tuple=True)
            best = self._teacher(last)[2][rows]
            q = model.logits(states[rows, step]).float().softmax(-1)
            slot = at[rows] - 1 - step
            column = best if ids is None else torch.searchsorted(ids, best).clamp_max(len(ids) - 1)
            sayable = torch.ones_like(best, dtype=torch.bool) if ids is None else ids[column] == best
            said["predicted"][step, slot], said["target"][step, slot] = self._said(q), best
            said["pred_conf"][step, slot] = q.amax(-1)
            said["target_conf"][step, slot] = q.gather(1, column[:, None])[:, 0] * sayable
        return wanted, said, outs

    def predictions(self, features: Features) -> Predictions:
        wanted, said, outs = self._look(features, self.config.ttt_length)
        slots = wanted[0].flatten().nonzero()[:, 0]
        picked = {name: x[:, slots] for name, x in said.items()}
        return Predictions(slots + 1, **picked, asked=wanted.flatten(1)[:, slots], hidden=outs[0].flatten(0, 1)[slots])

    def lengths(self, features: Features) -> Tensor:
        wanted, said, _ = self._look(features, self.drafter.steps)
        ids, length = features.batch.ids, features.batch.ids.shape[1]
        # the text itself says what was accepted: under a penalty, or at a near tie, the target's raw argmax need not
        text = [F.pad(ids[:, 2 + k :], (0, min(2 + k, length)), value=-1) for k in range(len(wanted))]
        hits = (said["predicted"].view_as(wanted) == torch.stack(text)) & wanted
        runs = hits.long().cumprod(0).sum(0)
        return F.pad(runs[:, :-1], (1, 0))

    def servable(self) -> dict[str, str]:
        return servable(self.drafter.model.config, self.drafter.model.embed_tokens is not None)

    def card(self) -> dict[str, Any]:
        ids = self.drafter.model.ids
        return {
            "shape": shape(self.drafter.model),
            "vocabulary_map": None if ids is None else digest(ids),
            "frozen_weights": self._frozen,
        }

    def save(self, folder: Path) -> None:
        write_drafter(self.drafter.model, folder)
