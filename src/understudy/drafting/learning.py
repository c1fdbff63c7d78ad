"""What a drafter and whoever teaches it while it decodes have to say to each other (DVI, Bhansali and Heck, 2025).

A drafter with a `Head` that can learn sets `Drafter.learning` to its options and puts a `Trace` into every proposal. The learner
(`understudy.training.online`) reads traces and verifier logits from cycles and changes the head's trainable tensors in place,
between cycles. The drafter's law changes, the output law does not.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from understudy.core.config import Config, option

if TYPE_CHECKING:  # commands read these options without loading torch
    from torch import Tensor


@dataclass(slots=True)
class Trace:
    """The states that the drafter's head read, one row per drafted token, in the order of the drafts."""

    hidden: Tensor  # [K, D] exactly what the head projected (after the norm)


class LearnOptions(Config):
    """Options of online learning. They work on `generate`, `bench` and `train dvi`, and as keys of `--drafter dvi,...`."""

    dvi_online: bool = option(False, "learn from every accept and reject while decoding")
    dvi_batch_size: int = option(64, "drafted positions per update", ge=1)
    dvi_update_every: int = option(8, "blocks (verify passes) between updates", ge=1)
    dvi_buffer_size: int = option(2048, "positions that the ring buffer holds", ge=1)
    dvi_store: Literal["full", "topk"] = option(
        "topk",
        "what is kept of the verifier's logits: all of them, or the largest K (then KD and KL are taken over those K)",
    )
    dvi_topk: int = option(1024, "K of --dvi-store topk; cut to the vocabulary", ge=1)
    dvi_logits_dtype: Literal["float16", "float32"] = option("float16", "dtype of stored verifier logits")
    dvi_tau: float = option(
        1.5, "temperature that softens the verifier's law in KD and KL; the drafter's stays at 1", gt=0
    )
    dvi_warmup_steps: int = option(
        1000, "verify passes before policy gradient comes in; the ramp after it is as long", ge=0
    )
    dvi_kd_lambda0: float = option(0.5, "weight of forward KL (KD) during warm-up", ge=0)
    dvi_kd_lambdamin: float = option(0.0, "weight of forward KL (KD) after the ramp", ge=0)
    dvi_ce_lambda: float = option(0.5, "weight of cross-entropy on accepted drafts", ge=0)
    dvi_pg_lambda_max: float = option(0.2, "weight of policy gradient after the ramp", ge=0)
    dvi_kl_lambda0: float = option(1.0, "weight of reverse KL during warm-up", ge=0)
    dvi_kl_lambdamin: float = option(0.1, "weight of reverse KL after the ramp", ge=0)
    dvi_entropy_weight: float = option(0.0, "weight of the entropy bonus", ge=0)
    dvi_baseline_ema: float = option(
        0.9, "share of the old value in the policy gradient's running mean of rewards", ge=0, lt=1
    )
    dvi_lr: float = option(5e-5, "learning rate (AdamW, weight decay 0.01, gradients clipped to norm 1)", gt=0)
    max_online_train_ms: float = option(5.0, "most milliseconds per update; batches shrink to fit. 0 = no limit", ge=0)
    dvi_guard: int = option(
        256,
        "positions over which the head is compared with the frozen head; when worse, the last good weights return. 0 = off",
        ge=0,
    )
    load_lora: Path | None = option(None, "checkpoint (.pt) of the head's LoRA to start from")
    save_lora_every: int = option(
        0,
        "updates between checkpoints (step_########.pt and latest.pt); 0 = only final.pt at the end, so a killed run leaves nothing",
        ge=0,
    )
    save_lora_path: Path | None = option(
        None, "folder for checkpoints of what is learned (needs --dvi-online true); none = nothing is saved"
    )
    dvi_debug: bool = option(False, "print count and bytes of the captured states of every block")
