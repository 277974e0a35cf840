"""Token embeddings and the language-model head, both split over the vocabulary.

Shapes: T packed tokens, S rows whose logits are wanted, H hidden size, V vocabulary.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from executor.layers.linear import LayerFactory, Linear
from executor.layers.sharding import Part, Sharding
from executor.parallel import TensorParallel


class VocabParallelEmbedding(nn.Module):
    """This rank's rows of the table. Other ranks' tokens give zeros here, and the ranks add up."""

    def __init__(self, vocab_size: int, hidden_size: int, factory: LayerFactory) -> None:
        super().__init__()
        self.tp = factory.tp
        self.part, rows = _vocab_part(vocab_size, factory.tp)
        self.weight = nn.Parameter(
            torch.empty(rows, hidden_size, dtype=factory.dtype), requires_grad=False
        )
        self.sharding = {"weight": Sharding(0, (self.part,), padded=True)}

    def forward(self, token_ids: Tensor) -> Tensor:
        """[T] -> [T, H]."""
        if self.tp.size == 1:
            return F.embedding(token_ids, self.weight)
        local = token_ids - self.part.start
        outside = (local < 0) | (local >= self.part.length)
        hidden = F.embedding(local.masked_fill(outside, 0), self.weight)
        return self.tp.all_reduce(hidden.masked_fill(outside.unsqueeze(-1), 0.0))


class LMHead(Linear):
    """Hidden states to logits. A tied head uses the embedding's weight and loads none itself."""

    def __init__(
        self,
        vocab_size: int,
        hidden_size: int,
        factory: LayerFactory,
        *,
        bias: bool = False,
        tied_to: VocabParallelEmbedding | None = None,
    ) -> None:
        part, rows = _vocab_part(vocab_size, factory.tp)
        super().__init__(hidden_size, rows, factory, bias=bias)
        self.vocab_size = vocab_size
        self.out_dtype = torch.float32
        self.sharding = {name: Sharding(0, (part,), padded=True) for name in ("weight", "bias")}
        # A tuple, because a module in an attribute would be registered a second time.
        self._tied_to = (tied_to,)
        if tied_to is not None:
            self.weight = None

    def finish_loading(self, device: torch.device) -> None:
        """A tied head packs a copy of the embedding's weight, or uses that weight itself."""
        embedding = self._tied_to[0]
        if embedding is not None:
            self.weight = embedding.weight
        super().finish_loading(device)
        if embedding is not None:
            self.weight = None  # the embedding's: named, moved and counted there

    def forward(self, hidden: Tensor) -> Tensor:
        """[S, H] -> [S, V] float32, the whole vocabulary on every rank."""
        logits = self.tp.all_gather(self.run(hidden), dim=-1)
        return logits[:, : self.vocab_size].float()


def _vocab_part(vocab_size: int, tp: TensorParallel) -> tuple[Part, int]:
    """This rank's rows, and how many its tensors have: the last rank may be padded."""
    rows = -(-vocab_size // tp.size)
    start = min(tp.rank * rows, vocab_size)
    return Part(vocab_size, start, min(rows, vocab_size - start)), rows
