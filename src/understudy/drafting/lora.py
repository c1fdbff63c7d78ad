"""A low-rank head over frozen weights (LoRA, Hu et al. 2106.09685), and the tensors of it on disk.

The base shares the storage of the weights that it is given, so it costs no memory, and nothing here writes to it: only A and B
learn. Their names end in `.proj.A` and `.proj.B`, in a module and on disk, and that is how they are found.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor, nn

from understudy.core.errors import UserError

SUFFIXES = (".proj.A", ".proj.B")


class LoRALinear(nn.Module):
    """y = W x + b + (alpha / r) B A x, with W and b frozen. A is random and B zero, so it begins as the base itself."""

    def __init__(
        self,
        weight: Tensor,  # [V, D], shared: not copied, never written
        bias: Tensor | None = None,  # [V], shared
        r: int = 8,
        alpha: float = 8.0,
        generator: Generator | None = None,  # of A, on the CPU; None = torch's own
    ) -> None:
        super().__init__()
        out, width = weight.shape
        self.base = nn.Linear(width, out, bias=bias is not None, device="meta")
        self.base.weight = nn.Parameter(weight.detach(), requires_grad=False)
        if bias is not None:
            self.base.bias = nn.Parameter(bias.detach(), requires_grad=False)
        # Whoever builds it may do so in inference mode, but a tensor that is made there can never learn.
        with torch.inference_mode(False):
            start = torch.empty(r, width)
            nn.init.kaiming_uniform_(start, a=math.sqrt(5), generator=generator)
            self.A = nn.Parameter(start.to(weight.device))  # [r, D] fp32
            self.B = nn.Parameter(torch.zeros(out, r, device=weight.device))  # [V, r] fp32
        self.scale = alpha / r

    def frozen(self, x: Tensor) -> Tensor:
        """The base alone: [..., D] -> [..., V] in the base's dtype."""
        y: Tensor = self.base(x.to(self.base.weight.dtype))
        return y

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., V] fp32. The base multiplies in its own dtype, A and B in fp32."""
        base = self.frozen(x).float()
        low = (x.float() @ self.A.T) * self.scale
        return torch.addmm(base.flatten(0, -2), low.flatten(0, -2), self.B.T).view_as(base)

    def trainable_params(self) -> list[nn.Parameter]:
        return [self.A, self.B]


def lora_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The A and B of a model, by their names."""
    return {name: p for name, p in model.named_parameters() if name.endswith(SUFFIXES)}


def lora_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the A and B of a model on the CPU, by their names. Nothing frozen is among them."""
    return {name: p.detach().to("cpu", copy=True) for name, p in lora_parameters(model).items()}


@torch.no_grad()
def load_lora_state_dict(model: nn.Module, sd: Mapping[str, Tensor]) -> None:
    """Write tensors into the A and B of the same names. UserError if one is missing, unknown, of another shape or not finite.

    Everything is checked before anything is written.
    """
    own = lora_parameters(model)
    if missing := sorted(own.keys() - sd.keys()):
        raise UserError(f"LoRA weights lack {', '.join(missing)}: they belong to another drafter")
    if unknown := sorted(sd.keys() - own.keys()):
        raise UserError(
            f"LoRA weights have {', '.join(unknown)}, which this drafter does not: they belong to another one"
        )
    for name, parameter in own.items():
        if sd[name].shape != parameter.shape:
            raise UserError(
                f"LoRA weights: {name} is {list(sd[name].shape)}, this drafter has {list(parameter.shape)}: "
                "use the rank and the model that they were trained with"
            )
        if not torch.isfinite(sd[name]).all():
            raise UserError(f"LoRA weights: {name} holds values that are no numbers")
    for name, parameter in own.items():
        parameter.copy_(sd[name])


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """A `.pt` of plain tensors as it was saved. UserError if it is missing, half a file, or more than tensors."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"no LoRA checkpoint at {path}") from None
    except Exception as error:  # whatever a damaged or foreign file makes the reader say
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path} is no LoRA checkpoint, or only a part of one: {reason[:120]}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} is no LoRA checkpoint: it holds a {type(content).__name__}")
    return content


def lora_of(content: Mapping[str, Any], path: str | Path) -> dict[str, Tensor]:
    """The A and B in what `read_checkpoint` read from `path`: under `lora`, or all that it holds. UserError if it is neither."""
    lora = content.get("lora", content)
    if not (
        isinstance(lora, Mapping)
        and lora
        and all(isinstance(k, str) and k.endswith(SUFFIXES) and isinstance(v, Tensor) for k, v in lora.items())
    ):
        raise UserError(f"{path} is no LoRA checkpoint: it has no weights that end in {' and '.join(SUFFIXES)}")
    return dict(lora)
