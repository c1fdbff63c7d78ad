"""DSpark's two small heads on a block that is already computed: a Markov correction, and confidence.

    z_k' = z_k + W_2 W_1[x_{k-1}]                        x_{k-1}: the token before draft k, true in training, drafted in decoding
    c_k  = sigmoid(w . [h_k, W_1[x_{k-1}]] + b)          how likely the target is to accept draft k

h_k is the block's last state, after the norm. (DSpark, arXiv 2607.05147; names of modules and weights as in public checkpoints.)
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class MarkovHead(nn.Module):
    """A correction of rank r by the token before."""

    def __init__(self, vocab: int, rank: int) -> None:
        super().__init__()
        self.markov_w1 = nn.Embedding(vocab, rank)
        self.markov_w2 = nn.Linear(rank, vocab, bias=False)

    def embed(self, tokens: Tensor) -> Tensor:
        """[..] int64 -> [.., r]."""
        embedded: Tensor = self.markov_w1(tokens)
        return embedded

    def correction(self, embedded: Tensor) -> Tensor:
        """[.., r] -> [.., V], added to the logits of the draft after."""
        logits: Tensor = self.markov_w2(embedded)
        return logits


class ConfidenceHead(nn.Module):
    """One number per draft; computed in fp32."""

    def __init__(self, width: int, rank: int) -> None:
        super().__init__()
        self.rank = rank  # 0 = it does not read the token before
        self.proj = nn.Linear(width + rank, 1)

    def forward(self, states: Tensor, embedded: Tensor) -> Tensor:
        """States [.., H] and embeddings of the tokens before [.., r] -> logits [..] of being accepted."""
        x = torch.cat([states, embedded], -1) if self.rank else states
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.float(), self.proj.weight.float(), self.proj.bias.float())[..., 0]
