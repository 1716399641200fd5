"""Models for texts as ids [B, T]; they give logits [B, T, vocabulary] of the next token."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vecfl.models.recurrent import GRU, LSTM


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


class CharLSTM(nn.Module):
    """The next token from all before it, by LSTM layers: 822,570 parameters for 90 tokens.

    Reddi et al., ICLR 2021, arXiv:2003.00295, the Shakespeare model: embeddings of 8 numbers, two
    layers of 256. The state dict of `recurrent` is that of `nn.LSTM(8, 256, 2)`.
    """

    layers: type[LSTM] | type[GRU] = LSTM

    def __init__(
        self, vocabulary: int = 90, embedding: int = 8, hidden: int = 256, layers: int = 2
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, embedding)
        self.recurrent = self.layers(embedding, hidden, layers, batch_first=True)
        self.logits = nn.Linear(hidden, vocabulary)

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.logits(self.recurrent(self.embedding(ids))[0])
        return logits


class CharGRU(CharLSTM):
    """`CharLSTM` with GRU layers, Cho et al. 2014, arXiv:1406.1078: 622,890 parameters."""

    layers = GRU
