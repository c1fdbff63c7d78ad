"""The offline objective of everything that trains on an early exit: soft cross-entropy against the full model (Kangaroo, 3.2).

    loss_t = - sum_v p_t(v) log q_t(v),    p_t = softmax of the target's logits after token t,  q_t that of the drafter

over the slots whose next token the assistant wrote. Exit states come live from the frozen target; nothing is shifted, because state
and teacher stand at the same slot. Logits are made in chunks.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from understudy.core.config import Config, option
from understudy.core.errors import UserError
from understudy.core.files import replacing, write_json
from understudy.core.records import Needs
from understudy.drafters.early_exit.adapter import Adapter
from understudy.drafters.early_exit.config import ExitConfig
from understudy.drafters.early_exit.drafter import ExitDrafter
from understudy.drafters.early_exit.files import exit_layer_of, read_adapter, write_adapter
from understudy.drafting.lora import lora_state_dict
from understudy.drafting.objective import Batch, Features, Objective, Predictions, StepOutput, TokenCounts
from understudy.drafting.own_cache import top_probability
from understudy.ops import laws
from understudy.ops.chunks import chunked_sums
from understudy.target.probe import probe
from understudy.target.target import Target


class ExitObjectiveConfig(Config):
    """Options of training on an early exit."""

    exit_layer: int = option(2, "layers that draft: the first E", "exitlayer", "early-layer", ge=1)
    threshold: float = option(
        0.6, "of drafting while acceptance is measured: stop after a draft less probable", ge=0, le=1
    )
    draft_steps: int = option(6, "most drafts per cycle while acceptance is measured", "num-speculative-tokens", ge=1)
    loss_chunk: int = option(1024, "slots whose logits exist at the same time", ge=1)
    adapter_bin: bool = option(False, "also write pytorch_model.bin, which Kangaroo's own code loads")


def supervised(batch: Batch) -> Tensor:
    """[B, T] bool: slots whose next token belongs to the same document and was written by the assistant."""
    inside = batch.documents[:, 1:] == batch.documents[:, :-1]
    out = torch.zeros_like(batch.mask)
    out[:, :-1] = batch.mask[:, 1:] & inside & (batch.documents[:, :-1] >= 0)
    return out


def begins(batch: Batch) -> Tensor:
    """[B, T] bool: slots whose token decoding would begin a cycle after: one of the assistant's, which another one follows."""
    return supervised(batch) & batch.mask


def runs(right: Tensor, slots: Tensor, most: int, sure: Tensor | None = None) -> Tensor:
    """[B, T] float: drafts that are accepted in a row from each slot on; at most `most`.

    `right`, `slots`, `sure` [B, T] bool. A slot that is not in `slots` ends a run, so no run leaves its document; after one that
    is right but not `sure` drafting stops, and it counts.
    """
    ok = (right & slots).float()
    goes_on = ok if sure is None else ok * sure
    total = ok
    for _ in range(1, most):  # drafts of a run of k + 1: this one, and a run of k from the next slot on
        total = ok + goes_on * F.pad(total[:, 1:], (0, 1))
    return total


class ExitObjective(Objective):
    """Trains the adapter of an `ExitDrafter`, or its draft head where it has no adapter."""

    def __init__(self, drafter: ExitDrafter, config: ExitObjectiveConfig) -> None:
        super().__init__()
        self.drafter: ExitDrafter = drafter
        self.config, self.exit_layer = config, drafter.config.exit_layer
        self.needs = Needs(taps=frozenset({self.exit_layer}), last=True)
        for parameter in drafter.parameters():
            parameter.requires_grad_(False)
        trained = drafter.adapter if drafter.adapter is not None else drafter.drafter_head
        assert trained is not None, "a bare exit has nothing to train"
        for name, parameter in trained.named_parameters():
            parameter.requires_grad_(drafter.adapter is not None or name.endswith((".A", ".B")))

    def reads(self, features: Features) -> Tensor:
        """What the head reads at every slot, [B, T, D]."""
        states, batch = features.taps[self.exit_layer], features.batch
        if self.drafter.adapter is not None:
            out: Tensor = self.drafter.adapter(states, batch.positions, batch.documents)
            return out
        return self.drafter.norm(states)

    def forward(self, features: Features) -> StepOutput:
        assert features.last is not None
        batch = features.batch
        slots = supervised(batch)
        reads = self.reads(features)
        count = slots.sum()
        right, sure = torch.zeros_like(slots), torch.zeros_like(slots)
        if not count:
            zero = reads.sum() * 0.0
            return StepOutput(zero.float(), count, {})

        def sums(read: Tensor, last: Tensor, at: Tensor) -> Tensor:
            # outside autocast: the target's own numbers are what decoding compares with
            with torch.no_grad(), torch.autocast(last.device.type, enabled=False):
                teacher = self.drafter.frozen_logits(last).float()
                agree = teacher.argmax(-1)
            logits = self.drafter.head_logits(read).float()
            right.view(-1)[at] = logits.detach().argmax(-1) == agree
            sure.view(-1)[at] = self._sure(logits.detach())
            loss = -(teacher.softmax(-1) * F.log_softmax(logits, -1)).sum(-1)
            entropy = -(teacher.softmax(-1) * F.log_softmax(teacher, -1)).sum(-1)
            overlap = torch.minimum(teacher.softmax(-1), logits.softmax(-1)).sum(-1)
            return torch.stack([loss.sum(), entropy.sum(), overlap.detach().sum()])

        at = slots.flatten().nonzero()[:, 0]
        flat = chunked_sums(sums, self.config.loss_chunk, reads.flatten(0, 1)[at], features.last.flatten(0, 1)[at], at)
        loss, entropy, overlap = flat.unbind()
        length = runs(right, slots, self.drafter.steps, sure)
        metrics = {
            "kl": ((loss - entropy).detach(), count),
            "acc_1": (right.sum(), count),
            "overlap": (overlap.detach(), count),
            "tau_sim": ((1 + length)[slots].sum(), count),
        }
        return StepOutput(loss, count, metrics)

    def _sure(self, logits: Tensor) -> Tensor:
        """[n] bool of logits [n, V]: drafting goes on after such a draft."""
        return top_probability(logits) >= self.drafter.config.threshold

    @torch.no_grad()
    def predictions(self, features: Features) -> Predictions:
        assert features.last is not None
        last, seen = features.last.flatten(0, 1), list[Tensor]()
        if self.drafter.adapter is None:
            reads, hidden = self.reads(features), features.taps[self.exit_layer]
        else:
            with self.drafter.adapter.norm.register_forward_pre_hook(lambda _, given: seen.append(given[0])):
                reads = self.reads(features)
            hidden = seen[0]
        slots = begins(features.batch).flatten().nonzero()[:, 0]
        tokens, beliefs = list[Tensor](), list[Tensor]()
        for at in slots.split(self.config.loss_chunk):
            law = self.drafter.head_logits(reads.flatten(0, 1)[at]).float().softmax(-1)
            both = torch.stack([law.argmax(-1), self.drafter.frozen_logits(last[at]).argmax(-1)])
            tokens.append(both)
            beliefs.append(law.gather(1, both.T).T)
        predicted, target = torch.cat(tokens, dim=1)[:, None].unbind()
        pred_conf, target_conf = torch.cat(beliefs, dim=1)[:, None].unbind()
        asked = torch.ones_like(predicted, dtype=torch.bool)
        return Predictions(slots, predicted, target, pred_conf, target_conf, asked, hidden.flatten(0, 1)[slots])

    @torch.no_grad()
    def lengths(self, features: Features) -> Tensor:
        """See `Objective`. A draft is accepted where it is the token that the text has: if the target wrote it, that is its choice."""
        slots = begins(features.batch)
        reads, ids = self.reads(features).flatten(0, 1), features.batch.ids.flatten()
        right, sure = torch.zeros_like(slots), torch.zeros_like(slots)
        for at in slots.flatten().nonzero()[:, 0].split(self.config.loss_chunk):
            logits = self.drafter.head_logits(reads[at])
            right.view(-1)[at] = laws.argmax(logits) == ids[at + 1]
            sure.view(-1)[at] = self._sure(logits)
        return runs(right, slots, self.drafter.steps, sure).long()

    def servable(self) -> dict[str, str]:
        reason = "it has no early exit: drafts need the target's own first layers and their cache"
        return {"understudy": "ok", "vllm": reason, "sglang": reason, "transformers": reason}

    def save(self, folder: Path) -> None:
        if self.drafter.adapter is not None:
            write_adapter(self.drafter.adapter, folder, released=self.config.adapter_bin)
            return
        write_json(folder / "config.json", {"architectures": ["DVIHead"], "exit_layer": self.exit_layer})
        with replacing(folder / "final.pt") as path:  # as the online learner saves heads: `dvi:FOLDER` reads it
            torch.save({**self.drafter.lora_extras(), "lora": lora_state_dict(self.drafter)}, path)


def train_kangaroo(
    config: ExitObjectiveConfig, target: Target, start: Path | None, counts: TokenCounts
) -> ExitObjective:
    """A new adapter, or the one in `start`, under training."""
    if config.exit_layer >= target.layers:
        raise UserError(
            f"--exit-layer {config.exit_layer}: the target has {target.layers} layers, one must be left to verify"
        )
    probe(target, "split", config.exit_layer)
    adapter = Adapter.identity(target, config.exit_layer) if start is None else read_adapter(start, target)
    if start is not None and (trained := exit_layer_of(start)) not in (None, config.exit_layer):
        raise UserError(f"{start} was trained at exit layer {trained}: give --exit-layer {trained}")
    drafting = ExitConfig(exit_layer=config.exit_layer, threshold=config.threshold, steps=config.draft_steps)
    return ExitObjective(ExitDrafter(target, drafting, adapter), config)
