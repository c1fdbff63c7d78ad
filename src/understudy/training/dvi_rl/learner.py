"""What learns, and all that it has to remember: two adapters, two optimizers, a baseline, and how far the stream was read."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from understudy.core.errors import UserError
from understudy.core.files import write_json
from understudy.target.target import Target
from understudy.training.checkpoints import STATE
from understudy.training.dvi_rl.adapters import DEEP, SHALLOW, inject_lora
from understudy.training.dvi_rl.buffer import Rollout
from understudy.training.dvi_rl.config import FREE, DviRlConfig
from understudy.training.dvi_rl.update import fast_step, slow_step
from understudy.training.rollouts.trainer import BAD_STEPS


@dataclass
class Progress:
    """Where training stands after its latest step."""

    baseline: float  # running mean of rewards
    step: int = 0  # steps of lora_S
    slow_steps: int = 0  # steps of lora_D
    position: int = 0  # conversations read
    prompts: int = 0  # of these, continued
    judged: int = 0  # drafts up to and including first rejects
    accepted: int = 0
    new_tokens: int = 0
    bad_steps: int = 0  # of lora_S, the latest ones in a row whose loss or gradient was no number
    bad_slow_steps: int = 0  # the same of lora_D


class Learner:
    """The adapters of a target and how they learn. Between two steps it is all there is: the buffer is empty then."""

    def __init__(self, target: Target, config: DviRlConfig) -> None:
        self.config = config
        self.adapters = inject_lora(
            target, config.exit_layer, config.rank, config.alpha, deep=config.slow_every > 0, seed=config.seed
        )
        self.drafter = self.adapters.drafter(config.steps, config.threshold)
        rates = {SHALLOW: config.lr_s, DEEP: config.lr_d}
        self.optimizers = {
            name: torch.optim.AdamW(self.adapters.trainable(name), lr=rates[name]) for name in self.adapters.names
        }
        self.progress = Progress(config.baseline_init)

    def learn(self, rollouts: Sequence[Rollout]) -> dict[str, Any]:
        """One step of `lora_S`, and one of `lora_D` where it is due. Returns the line of the log, without what the loop adds.

        `accept_rate` is the mean reward of this batch, `ppl_sample` the perplexity of its committed text under the verifier that
        continued it. UserError after `BAD_STEPS` steps of the same adapter in a row without a number.
        """
        config, now = self.config, self.progress
        records = [record for rollout in rollouts for record in rollout.records]
        accepted = int(sum(record.reward for record in records))
        new_tokens = sum(rollout.new_tokens for rollout in rollouts)
        fast = fast_step(self.drafter, self.optimizers[SHALLOW], rollouts, now.baseline, config.max_grad_norm)
        now.step, rate, used = now.step + 1, accepted / len(records), now.baseline
        if fast.stepped:
            now.baseline = config.baseline_momentum * used + (1 - config.baseline_momentum) * rate
        now.bad_steps = 0 if fast.stepped else now.bad_steps + 1
        slow = None
        if config.slow_every and now.step % config.slow_every == 0:
            slow = slow_step(
                self.adapters, self.optimizers[DEEP], rollouts, config.beta_kl, config.observed, config.max_grad_norm
            )
            now.slow_steps += slow.stepped
            now.bad_slow_steps = 0 if slow.stepped else now.bad_slow_steps + 1
        for bad, loss, rate_of in ((now.bad_steps, "loss_rl", "--lr-s"), (now.bad_slow_steps, "loss_slow", "--lr-d")):
            if bad >= BAD_STEPS:
                raise UserError(f"{loss} or its gradient was no number in {BAD_STEPS} steps in a row: lower {rate_of}")
        return {
            "step": now.step,
            "loss_rl": fast.loss,
            "loss_slow": None if slow is None else slow.loss,
            "accept_rate": rate,
            "ppl_sample": math.exp(sum(rollout.nll for rollout in rollouts) / new_tokens),
            "baseline": used,
            "judged": len(records),
            "accepted": accepted,
            "confidence": sum(record.verifier_confidence for record in records) / len(records),
            "new_tokens": new_tokens,
            "tokens_per_s": new_tokens / max(sum(rollout.seconds for rollout in rollouts), 1e-9),
            "grad_norm": fast.grad_norm,
            "stepped": fast.stepped,
            "hidden_error": fast.hidden_error,
            "slow": None if slow is None else asdict(slow),
        }

    def save(self, folder: Path) -> None:
        """Fill a checkpoint folder: `lora_S/`, `lora_D/`, `config.json`, and in `trainer_state/` what only training needs."""
        self.adapters.save(folder)
        write_json(folder / "config.json", self.config.model_dump(mode="json"))
        state = folder / STATE
        state.mkdir()
        write_json(state / "loop.json", asdict(self.progress))
        content = io.BytesIO()
        torch.save({name: optimizer.state_dict() for name, optimizer in self.optimizers.items()}, content)
        (state / "optimizers.pt").write_bytes(content.getvalue())

    def load(self, folder: Path) -> None:
        """Go on where `save` was called. UserError if the options differ in more than how far to go, or a file is damaged."""
        self.check_same_run(folder)
        loop = _json(folder / STATE / "loop.json")
        try:
            optimizers = torch.load(folder / STATE / "optimizers.pt", map_location="cpu", weights_only=True)
            progress = Progress(**loop)
        except Exception as error:  # whatever a damaged or foreign file makes the reader say
            raise UserError(f"cannot continue from {folder}: {' '.join(str(error).split())[:200]}") from None
        self.adapters.load(folder)
        try:
            for name, optimizer in self.optimizers.items():
                optimizer.load_state_dict(optimizers[name])
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"cannot continue from {folder}: its optimizer does not fit: {error}") from None
        self.progress = progress

    def check_same_run(self, folder: Path) -> None:
        """UserError if the checkpoint in `folder` is of a run with other options, those apart that say how far to go and where."""
        before = _json(folder / "config.json")
        now = self.config.model_dump(mode="json")
        for key in (key for key in now if key in before and key not in FREE):
            if now[key] != before[key]:
                flag = "--" + key.replace("_", "-")
                raise UserError(f"the run was begun with {flag} {before[key]}, not {now[key]}: resume it with the same")


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    except ValueError:
        raise UserError(f"{path} is not JSON; continue from another checkpoint") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no settings; continue from another checkpoint")
    return content
