"""A small transformer with tied embeddings learns a text letter by letter: K-FAC beside AdamW, by step and by time.

`python docs/examples/language.py OUT [SECONDS]` trains every run for the same CPU time on one thread, prints the loss
on text that was held out, and draws `language.png` into OUT. The text is the manual that comes with Python. All runs
start from the same parameters and see the same batches in the same order. Then K-FAC and AdamW learn to add numbers.
"""

import sys
import time
from pathlib import Path
from pydoc_data.topics import topics

import matplotlib.pyplot as plt
import torch
from torch import nn

import fisherfn as ff

WIDTH, HEADS, LAYERS, LENGTH, BATCH = 48, 4, 2, 32, 64
RATES = (3e-3, 1e-2, 3e-2)


def letters():
    """Return the text as numbers of letters, and how many letters there are; nine tenths are for training."""
    text = "".join(topics[name] for name in sorted(topics))
    alphabet = {letter: number for number, letter in enumerate(sorted(set(text)))}
    ids = torch.tensor([alphabet[letter] for letter in text])
    return ids[: len(ids) * 9 // 10], ids[len(ids) * 9 // 10 :], len(alphabet)


class Block(nn.Module):
    """Causal attention and an MLP, each after a layer norm and added to its input."""

    def __init__(self):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, h):
        """Return the features of every letter."""
        mask = nn.Transformer.generate_square_subsequent_mask(h.shape[1])
        x = self.norms[0](h)
        h = h + self.attention(x, x, x, attn_mask=mask, need_weights=False)[0]
        return h + self.mlp(self.norms[1](h))


class Language(nn.Module):
    """A language model whose output layer has the weight of its embedding."""

    def __init__(self, alphabet):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(alphabet, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.blocks, self.norm = nn.Sequential(*(Block() for _ in range(LAYERS))), nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, alphabet, bias=False)
        for embedding in (self.tokens, self.positions):
            nn.init.normal_(embedding.weight, std=0.1)
        self.head.weight = self.tokens.weight

    def forward(self, ids):
        """Return the logits of every next letter."""
        places = torch.arange(ids.shape[1])
        return self.head(self.norm(self.blocks(self.tokens(ids) + self.positions(places))))


def natural(net, batches):
    """Train with K-FAC without hyperparameters."""
    optimizer = ff.optim.NaturalGradient(net, likelihood=ff.Categorical())
    for x, y in batches:
        yield optimizer.step((x, y))


def adamw(net, batches, lr):
    """Train with AdamW, by the same loss: the sum over the letters of a sequence."""
    optimizer = torch.optim.AdamW(net.parameters(), lr=lr)
    for x, y in batches:
        optimizer.zero_grad()
        loss = LENGTH * nn.functional.cross_entropy(net(x).flatten(0, 1), y.flatten())
        loss.backward()
        optimizer.step()
        yield loss.detach()


def batches(ids, seed):
    """Yield sequences from random places, each with the letters that follow, without end."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(len(ids) - LENGTH, (BATCH, 1), generator=generator)
        window = ids[starts + torch.arange(LENGTH + 1)]
        yield window[:, :-1], window[:, 1:]


def run(name, loop, budget, steps, **options):
    """Train until CPU time or steps are over: the loss of every step, when it was done, and that on held-out text."""
    train, test, alphabet = letters()
    torch.manual_seed(0)
    net, losses, seconds = Language(alphabet), [], []
    began = time.process_time()
    for loss in loop(net, batches(train, 1), **options):
        losses.append(loss / LENGTH)
        seconds.append(time.process_time() - began)
        if seconds[-1] > budget or len(losses) == steps:
            break
    with torch.no_grad():
        held_out = [batch for batch, _ in zip(batches(test, 2), range(20), strict=False)]
        each = [nn.functional.cross_entropy(net(x).flatten(0, 1), y.flatten()) for x, y in held_out]
    left = torch.stack(each).mean().item()
    print(f"{name:28} {len(losses):5} steps, {1e3 * seconds[-1] / len(losses):4.0f} ms each, held-out loss {left:.3f}")
    return {"loss": torch.stack(losses), "seconds": torch.tensor(seconds), "held_out": left}


def additions(seed, batch=128):
    """Yield sums such as `37+45=082` as numbers of letters; only the three digits of the answer count."""
    generator, letters = torch.Generator().manual_seed(seed), {letter: n for n, letter in enumerate("0123456789+=")}
    while True:
        pairs = torch.randint(100, (batch, 2), generator=generator).tolist()
        ids = torch.tensor([[letters[c] for c in f"{a:02d}+{b:02d}={a + b:03d}"] for a, b in pairs])
        labels = ids[:, 1:].clone()
        labels[:, :5] = -100
        yield ids[:, :-1], labels


def calculate(name, loop, steps, **options):
    """Learn to add; return the share of right answers."""
    torch.manual_seed(0)
    net, began = Language(12), time.process_time()
    for _ in zip(range(steps), loop(net, additions(1), **options), strict=False):
        pass
    seconds = time.process_time() - began
    x, y = next(additions(2, 1000))
    with torch.no_grad():
        right = (net(x).argmax(-1) == y)[:, 5:].all(1).float().mean().item()
    print(f"{name:28} {steps:5} steps, {seconds:3.0f} s, {right:.0%} of the sums right")
    return right


def main(out: Path, small: bool = False, budget: float = 40.0) -> dict:
    """Train all runs, print how they end, draw `language.png`."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    limits = (budget, 25 if small else None)
    try:
        runs = {"K-FAC, defaults": run("K-FAC, defaults", natural, *limits)}
        for lr in RATES[:1] if small else RATES:
            runs[f"AdamW, learning rate {lr:g}"] = run(f"AdamW, learning rate {lr:g}", adamw, *limits, lr=lr)
        for steps in (2,) if small else (200, 400):
            calculate("K-FAC, defaults", natural, steps)
            calculate("AdamW, learning rate 0.003", adamw, steps, lr=3e-3)
    finally:
        torch.set_num_threads(threads)
    draw(out / "language.png", runs)
    return runs


def draw(file: Path, runs: dict) -> None:
    """Draw means of twenty steps, by step and by time."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    window = min(20, *(len(found["loss"]) for found in runs.values()))
    colours = {"K-FAC": ["#D55E00"], "AdamW": ["#56B4E9", "#0072B2", "#009E73"]}
    for name, found in runs.items():
        colour = colours[name.split(",")[0]].pop(0)
        smooth = found["loss"].unfold(0, window, 1).mean(1)
        axes[0].plot(range(window, len(smooth) + window), smooth, color=colour, label=name)
        axes[1].plot(found["seconds"][window - 1 :], smooth, color=colour, label=name)
    natural = [len(found["loss"]) for name, found in runs.items() if name.startswith("K-FAC")]
    axes[0].set(xlabel="step", ylabel="training loss, nats per letter", title="By step", xlim=(0, max(natural)))
    axes[1].set(xlabel="CPU time of one thread, seconds", title="By time")
    axes[1].legend(frameon=False)
    for axis in axes:
        axis.grid(alpha=0.3)
    figure.savefig(file, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    given = sys.argv[1:]
    main(Path(given[0] if given else "."), **({"budget": float(given[1])} if len(given) > 1 else {}))
