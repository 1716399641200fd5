"""Models for texts as ids [B, T]; they give logits [B, T, vocabulary] of the next token."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class WindowLM(nn.Module):
    """The next token from the last `context` ones: their embeddings, a hidden layer, logits.

    The same layers at each position, a causal convolution; zeros stand before the first token.
    Bengio et al., JMLR 2003, "A neural probabilistic language model".
    """

    def __init__(
        self, vocabulary: int, context: int = 10, embedding: int = 16, hidden: int = 512
    ) -> None:
        super().__init__()
        self.context = context
        self.embedding = nn.Embedding(vocabulary, embedding)
        self.hidden = nn.Linear(context * embedding, hidden)
        self.logits = nn.Linear(hidden, vocabulary)

    def forward(self, ids: Tensor) -> Tensor:
        length = ids.shape[-1]
        past = F.pad(self.embedding(ids), (0, 0, self.context - 1, 0))
        # Slices, not `unfold`, whose backward pass vmap takes one client at a time.
        window = torch.cat([past[:, i : i + length] for i in range(self.context)], -1)
        logits: Tensor = self.logits(F.relu(self.hidden(window)))
        return logits
