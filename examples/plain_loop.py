"""A small GPT over bytes in plain PyTorch, with bigkernel's attention and AdamW.

python examples/plain_loop.py --data my-texts.txt --steps 1000
"""

import argparse

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from bigkernel import scaled_dot_product_attention
from bigkernel.data import load_corpus
from bigkernel.optim import AdamW


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x):  # [batch, tokens, width]
        qkv = self.qkv(self.norms[0](x)).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # views, read where they lie
        y = scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norms[1](x))


class GPT(nn.Module):
    def __init__(self, width: int, layers: int, length: int) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(256, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(Block(width, width // 32) for _ in range(layers)))
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 256))

    def forward(self, ids):
        places = torch.arange(ids.shape[1], device=ids.device)
        return self.head(self.blocks(self.tokens(ids) + self.places(places)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default=None, help="default: help texts of Python's own library")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    options = parser.parse_args()

    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    text = "\n".join(load_corpus(options.data).documents).encode()
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    model = GPT(options.width, options.layers, options.length).to(device)
    optimizer = AdamW(model.parameters(), lr=1e-3, weight_decay=0.1, max_grad_norm=1.0)
    for step in range(1, options.steps + 1):
        starts = torch.randint(len(data) - options.length - 1, (options.batch_size, 1))
        rows = data[starts + torch.arange(options.length + 1)].to(device)
        loss = cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step == 1 or step % 50 == 0 or step == options.steps:
            print(f"step {step}: {loss.item():.3f} nats a byte, gradient {optimizer.grad_norm:.2f}")


if __name__ == "__main__":
    main()
