"""A sequence-to-sequence transformer: "four hundred two thousand nineteen" becomes "402019"."""

import argparse

import torch
from torch import nn

NAMES = """one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen
eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety hundred thousand""".split()
TOKENS = ["", "<start>", "<end>", *"0123456789", *NAMES]


def words(n):
    if n < 100:
        return [NAMES[n - 1]] * (n > 0) if n < 20 else [NAMES[17 + n // 10], *words(n % 10)]
    size, name = (1000, "thousand") if n >= 1000 else (100, "hundred")
    return [*words(n // size), name, *words(n % size)]


def pairs(numbers):
    """Words, and digits: two tensors of tokens, a row for each number."""
    for sentences in (map(words, numbers), (["<start>", *str(n), "<end>"] for n in numbers)):
        rows = [torch.tensor([*map(TOKENS.index, sentence)], device=device) for sentence in sentences]
        yield nn.utils.rnn.pad_sequence(rows, batch_first=True)


class Translator(nn.Transformer):
    def __init__(self):
        super().__init__(64, 4, 2, 2, 256, dropout=0.0, batch_first=True)
        self.token, self.place = nn.Embedding(len(TOKENS), 64), nn.Embedding(12, 64)

    def forward(self, source, target):
        read, written = (self.token(t) + self.place.weight[: t.shape[1]] for t in (source, target))
        later, empty = self.generate_square_subsequent_mask(target.shape[1], device), source == 0
        return super().forward(read, written, None, later, None, empty, None, empty) @ self.token.weight.T


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=200)
args, device = parser.parse_args(), "cuda" if torch.cuda.is_available() else "cpu"
torch.manual_seed(0)
model = Translator().to(device)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
numbers = torch.randperm(999_999).add(1).split(128)
for step in range(args.steps):
    source, target = pairs(numbers[step].tolist())
    loss = nn.functional.cross_entropy(model(source, target[:, :-1]).mT, target[:, 1:], ignore_index=0)
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    if step % 10 == 0:
        print(f"step {step} loss {loss.item():.6f}")
source, target = pairs(torch.cat(numbers[-8:]).tolist())
said = target[:, :1]
with torch.no_grad():
    while said.shape != target.shape:
        said = torch.cat([said, model(source, said)[:, -1:].argmax(-1)], 1)
print(f"held-out: exact match {((said == target) | (target == 0)).all(1).float().mean():.3f}")
