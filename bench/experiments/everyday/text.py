"""Text: the next character by a GRU and by a transformer's decoder, and vectors of words."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.experiments.everyday.script import Script, task
from bench.experiments.harness import EVALUATED, Task
from bench.shipped import text

LENGTH = 32


class GRU(nn.Module):
    """Scores of the next character after each one [B, T, n]."""

    def __init__(self, letters: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(letters, 32)
        self.gru = nn.GRU(32, 64, batch_first=True)
        self.head = nn.Linear(64, letters)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.gru(self.embedding(x))[0])


class Block(nn.Module):
    """Causal attention and a feed-forward net, each behind a norm and beside the identity."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        b, t, d = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(b, t, d))
        return x + self.mlp(self.norm2(x))


class Decoder(nn.Module):
    """A small GPT, whose embedding is its head."""

    def __init__(self, letters: int, width: int = 48) -> None:
        super().__init__()
        self.embedding = nn.Embedding(letters, width)
        self.position = nn.Parameter(0.02 * torch.randn(LENGTH, width))
        self.blocks = nn.Sequential(Block(width, 4), Block(width, 4))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, letters, bias=False)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.embedding(x) + self.position)))


def next_character(kind: type[nn.Module], seed: int) -> Task:
    codes, letters = text()
    model, split, criterion = kind(len(letters)), len(codes) * 9 // 10, nn.CrossEntropyLoss()
    train, test = (part.unfold(0, LENGTH + 1, step) for part, step in ((codes[:split], 1), (codes[split:], LENGTH)))

    def loss(rows: Tensor) -> Tensor:
        return criterion(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())

    def measure() -> tuple[Tensor, Tensor]:
        return loss(train[:EVALUATED:7]), loss(test)

    return task("scikit-learn's descriptions", model, (train,), 32, seed, loss, measure, criterion)


class WordVectors(nn.Module):
    """Vectors of words and of those around them, whose products tell pairs that were written from pairs that were drawn."""

    def __init__(self, words: int, width: int = 32) -> None:
        super().__init__()
        self.word, self.context = nn.Embedding(words, width), nn.Embedding(words, width)

    def forward(self, word: Tensor, near: Tensor, drawn: Tensor) -> Tensor:
        vector = self.word(word)
        written = F.logsigmoid((vector * self.context(near)).sum(1))
        return -(written + F.logsigmoid(-(self.context(drawn) @ vector[:, :, None]).squeeze(2)).sum(1)).mean()


def word_vectors(seed: int) -> Task:
    codes, letters = text()
    words = "".join(letters[code] for code in codes).lower().split()
    known = sorted(set(words))
    numbers = torch.tensor([known.index(word) for word in words])
    model = WordVectors(len(known))
    pairs = torch.cat([torch.stack([numbers[gap:], numbers[:-gap]], 1) for gap in (1, 2)])
    pairs = pairs[torch.randperm(len(pairs), generator=torch.Generator().manual_seed(0))]
    split = len(pairs) * 9 // 10

    def loss(rows: Tensor) -> Tensor:
        return model(rows[:, 0], rows[:, 1], numbers[torch.randint(len(numbers), (len(rows), 5))])

    def measure() -> tuple[Tensor, Tensor]:
        return loss(pairs[:split]), loss(pairs[split:])

    return task("scikit-learn's descriptions", model, (pairs[:split],), 128, seed, loss, measure)


SCRIPTS = [
    Script(
        "characters, GRU", "32 characters, 64 units, batch 32", lambda seed: next_character(GRU, seed),
        seconds=6, score_name="test loss",
    ),
    Script(
        "characters, transformer", "a GPT of two blocks of width 48, tied embedding, batch 32",
        lambda seed: next_character(Decoder, seed), seconds=6, score_name="test loss",
    ),
    Script(
        "word vectors", "two embeddings of width 32, five negative samples, batch 128", word_vectors,
        seconds=4, score_name="test loss",
    ),
]  # fmt: skip
