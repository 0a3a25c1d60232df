"""A small transformer with tied embeddings learns to add: K-FAC without numbers beside AdamW at the best of three rates.

`python docs/examples/arithmetic.py OUT [SECONDS]` trains every run for the same CPU time on one thread, prints loss and
accuracy on sums that were held out, and draws `arithmetic.png` into OUT: by step and by time. All runs start from the
same parameters and see the same batches in the same order.
"""

import sys
import time
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import nn

import fisherfn as ff

TOKENS = "0123456789+="
WIDTH, HEADS, LAYERS, BATCH = 48, 4, 2, 256
RATES = (1e-3, 3e-3, 1e-2)
IGNORED = -100
ANSWER = 3
"""Digits of a sum, the last digit first."""


def sums(generator):
    """All sums of two numbers below 100 in random order: tokens `[10000, 8]`, and targets where the answer is."""
    pairs = torch.cartesian_prod(torch.arange(100), torch.arange(100))
    left, right = pairs[torch.randperm(len(pairs), generator=generator)].unbind(1)
    total = left + right
    plus, equals = (torch.full_like(left, TOKENS.index(sign)) for sign in "+=")
    text = [left // 10, left % 10, plus, right // 10, right % 10, equals, total % 10, total // 10 % 10, total // 100]
    ids = torch.stack(text, 1)
    targets = ids[:, 1:].clone()
    targets[:, :-ANSWER] = IGNORED  # the numbers to add are not predicted
    return ids[:, :-1], targets


class Block(nn.Module):
    """Causal attention and an MLP, each after a layer norm and added to its input."""

    def __init__(self):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, h):
        """Return the features of every token."""
        mask = nn.Transformer.generate_square_subsequent_mask(h.shape[1])
        x = self.norms[0](h)
        h = h + self.attention(x, x, x, attn_mask=mask, need_weights=False)[0]
        return h + self.mlp(self.norms[1](h))


class Adder(nn.Module):
    """A language model of sums, whose output layer has the weight of its embedding."""

    def __init__(self):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(len(TOKENS), WIDTH), nn.Embedding(8, WIDTH)
        self.blocks, self.norm = nn.Sequential(*(Block() for _ in range(LAYERS))), nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, len(TOKENS), bias=False)
        for embedding in (self.tokens, self.positions):
            nn.init.normal_(embedding.weight, std=0.1)
        self.head.weight = self.tokens.weight

    def forward(self, ids):
        """Return the logits of every next token."""
        places = torch.arange(ids.shape[1])
        return self.head(self.norm(self.blocks(self.tokens(ids) + self.positions(places))))


def natural(net, batches):
    """Train with K-FAC, which finds its own numbers."""
    optimizer = ff.optim.NaturalGradient(net, likelihood=ff.Categorical())
    for x, y in batches:
        yield optimizer.step((x, y))


def adamw(net, batches, lr):
    """Train with AdamW, by the same loss: the sum over the answer's digits."""
    optimizer = torch.optim.AdamW(net.parameters(), lr=lr)
    for x, y in batches:
        optimizer.zero_grad()
        loss = ANSWER * nn.functional.cross_entropy(net(x).flatten(0, 1), y.flatten(), ignore_index=IGNORED)
        loss.backward()
        optimizer.step()
        yield loss.detach()


def batches(x, y):
    """Batches without end, in an order of their own."""
    generator = torch.Generator().manual_seed(1)
    while True:
        for rows in torch.randperm(len(x), generator=generator).split(BATCH):
            if len(rows) == BATCH:
                yield x[rows], y[rows]


def run(name, loop, train, test, budget, *rate):
    """Train until the CPU time is over: the loss of every step, when it was done, and what is got right at the end."""
    torch.manual_seed(0)
    net, curve, seconds = Adder(), [], []
    began = time.process_time()
    for loss in loop(net, batches(*train), *rate):
        curve.append(loss)
        seconds.append(time.process_time() - began)
        if seconds[-1] > budget:
            break
    with torch.no_grad():
        answers = net(test[0])[:, -ANSWER:].argmax(-1)
    right = (answers == test[1][:, -ANSWER:]).all(1).float().mean().item()
    curve = torch.stack(curve)
    print(f"{name:20} {len(curve):5} steps, loss {curve[-20:].mean():.4f}, {100 * right:5.1f} % of held-out sums right")
    return {"loss": curve, "seconds": torch.tensor(seconds), "right": right}


def main(out: Path, small: bool = False, budget: float = 60.0) -> dict:
    """Train all runs, print how they end, draw `arithmetic.png`."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        x, y = sums(torch.Generator().manual_seed(0))
        train, test = (x[:8000], y[:8000]), (x[8000:], y[8000:])
        budget = 1.0 if small else budget
        runs = {"K-FAC, no numbers": run("K-FAC, no numbers", natural, train, test, budget)}
        for lr in RATES[1:2] if small else RATES:
            runs[f"AdamW, rate {lr:g}"] = run(f"AdamW, rate {lr:g}", adamw, train, test, budget, lr)
    finally:
        torch.set_num_threads(threads)
    draw(out / "arithmetic.png", runs)
    return runs


def draw(file: Path, runs: dict) -> None:
    """Draw means of twenty steps, by step and by time."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    window = min(20, *(len(found["loss"]) for found in runs.values()))
    for (name, found), colour in zip(runs.items(), ("#D55E00", "#56B4E9", "#0072B2", "#009E73"), strict=False):
        smooth = found["loss"].unfold(0, window, 1).mean(1)
        axes[0].semilogy(range(window, len(smooth) + window), smooth, color=colour, label=name)
        axes[1].semilogy(found["seconds"][window - 1 :], smooth, color=colour, label=name)
    axes[0].set(xlabel="step", ylabel="training loss, nats per sum", title="By step")
    axes[0].set_xlim(0, 3 * len(runs["K-FAC, no numbers"]["loss"]))
    axes[1].set(xlabel="CPU time of one thread, seconds", title="By time")
    axes[1].legend(frameon=False)
    for axis in axes:
        axis.grid(alpha=0.3)
    figure.savefig(file, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    given = sys.argv[1:]
    main(Path(given[0] if given else "."), **({"budget": float(given[1])} if len(given) > 1 else {}))
