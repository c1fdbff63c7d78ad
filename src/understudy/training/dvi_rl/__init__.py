"""DVI-RL: a drafter that learns from accepts and rejects by policy gradient, with a LoRA on each side of the exit layer.

The policy pi is the first E layers with `lora_S`, read by the target's own norm and head. Every draft is rewarded with 1 if the
verifier agrees and 0 if not, and after enough of them

    loss_rl = -E[(r - baseline) log pi(draft | state)]                     AdamW on lora_S, baseline = running mean of r

Every `slow_every` such steps, if at all, the verifier may move too (this changes the model, and is off by default):

    loss_slow = CE(verifier, observed tokens) + beta_kl KL(verifier || frozen verifier)                 AdamW on lora_D

Rollouts are greedy. Drafts are then the policy's argmax and no draws from it, so this is no unbiased estimate of the gradient of the
accept rate: it raises what was accepted and lowers what was rejected, and leaves tokens that were never drafted to the softmax.

    understudy train dvi-rl --exit-layer 2 --output-dir runs/rl          training
    understudy experiment dvi-rl --exit-layer 2 --output-dir runs/rl     the same between two evaluations, with results/*.json

Nothing is in memory between two steps but the adapters, their optimizers and the baseline: the buffer is empty there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from argparse import Namespace

    from understudy.training.dvi_rl.adapters import DualLoRA
    from understudy.training.dvi_rl.train import Trained


def inject_lora(base_model: Any, exit_layer: int, **settings: Any) -> DualLoRA:
    """Put `lora_S` and `lora_D` on a model: see `understudy.training.dvi_rl.adapters.inject_lora`."""
    from understudy.training.dvi_rl.adapters import inject_lora as inject

    return inject(base_model, exit_layer, **settings)


def main(args: Namespace) -> Trained:
    """Train with the options in `args`: those of `understudy train dvi-rl`, underscores for hyphens.

    `model_name` (or `model`), `dtype` and `device` say which target; what is absent or None has its default. UserError for a name
    that is no option, and for all that the command refuses.
    """
    from understudy.training.dvi_rl.run import run_namespace

    return run_namespace(args)
