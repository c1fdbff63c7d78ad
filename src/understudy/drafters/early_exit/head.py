"""DVI's draft head: a LoRA over the target's own output projection, which stays frozen and shared (Bhansali and Heck, 2025).

    logits = W h + (alpha / r) B A h

W is the very tensor that the verifier uses: it is read, never written. Only A and B have gradients, and B begins at zero, so an
untrained head drafts what the bare exit drafts. Soft-caps and logit scales of the family stand behind it as behind the target's head.
"""

from __future__ import annotations

from torch import Generator, Tensor, nn

from understudy.core.errors import UserError
from understudy.drafting.lora import LoRALinear
from understudy.target.stages import Head
from understudy.target.target import Target


class DrafterHead(nn.Module):
    """States [n, D] (after the norm) -> logits [n, V]."""

    def __init__(self, target: Target, r: int = 8, alpha: float = 8.0, generator: Generator | None = None) -> None:
        super().__init__()
        own = target.model.get_output_embeddings()
        if not isinstance(own, nn.Linear):
            raise UserError(
                f"drafter dvi: the output projection of {type(target.model).__name__} is a {type(own).__name__}, not a linear layer"
            )
        self.proj = LoRALinear(own.weight, own.bias, r=r, alpha=alpha, generator=generator)
        self._head = [Head(target.model, self.proj)]

    def forward(self, hk: Tensor) -> Tensor:
        return self._head[0](hk)

    def lora_params(self) -> list[nn.Parameter]:
        """A and B: all that trains."""
        return self.proj.trainable_params()
