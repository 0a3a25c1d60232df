"""The Fisher block of one layer and its approximations, as images.

A small classifier is trained for a few steps, so that activations and gradients are no longer independent, as K-FAC
assumes. The picture shows the Fisher of its middle layer, six approximations with their errors ‖F − F̂‖ / ‖F‖, and the
Fisher of the whole net, with a frame around the block of the layer.
"""

import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch.func import functional_call

import fisherfn as ff

METHODS = {
    "K-FAC": ff.kfac(),
    "E-KFAC": ff.ekfac(),
    "KPSVD": ff.kpsvd(),
    "K-FAC corrected": ff.kfac_corrected(),
    "Deflation": ff.deflation(),
    "Lanczos": ff.lanczos(),
}
LAYER = "2"


def problem(examples: int, generator: torch.Generator):
    """A net 6-5-4-3 with tanh, in double precision; three classes on a curve in six dimensions."""
    net = torch.nn.Sequential(
        torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 4), torch.nn.Tanh(), torch.nn.Linear(4, 3)
    )
    params = {n: torch.randn(p.shape, generator=generator).double() * 0.6 for n, p in net.named_parameters()}
    angle = 6 * torch.rand(examples, 1, generator=generator).double()
    x = torch.cat([torch.sin(k * angle) for k in range(1, 7)], 1)
    return lambda p, x: functional_call(net, p, (x,)), params, (x, (angle[:, 0] // 2).long())


def matrix(product, params):
    """The matrix of a linear map on trees like params, from its products with unit vectors."""
    sizes, shapes = [p.numel() for p in params.values()], [p.shape for p in params.values()]

    def on_vector(v):
        tree = {n: part.reshape(s) for n, part, s in zip(params, v.split(sizes), shapes, strict=True)}
        return torch.cat([leaf.reshape(-1) for leaf in product(tree).values()])

    return torch.vmap(on_vector)(torch.eye(sum(sizes)).double()).T


def main(out: Path, small: bool = False) -> dict:
    """Print the errors, draw `fisher_blocks.png`."""
    rng = torch.Generator().manual_seed(4)
    model, params, batch = problem(64 if small else 256, rng)
    build = {"likelihood": ff.Categorical(), "fisher": "type2"}
    ng = ff.natural_gradient(model, params, batch[0], method=ff.exact(), **build)
    for _ in range(3 if small else 10):
        params = ff.tree.add(params, ng(params, ng.stats(params, batch), damping=0.1), scale=-0.5)

    stats = ng.stats(params, batch)
    full = ng.fisher(stats).dense()
    start = sum(p.numel() for n, p in params.items() if n < LAYER)  # the parameters of the layers before
    end = start + sum(p.numel() for n, p in params.items() if n.startswith(LAYER))
    images, errors = {"sampled Fisher": full[start:end, start:end]}, {}
    for name, method in METHODS.items():
        ng = ff.natural_gradient(model, params, batch[0], method=method, **build)
        state, info = ng.update(ng.init(params), stats)
        ff.check(info)
        images[name] = matrix(lambda tree, ng=ng, state=state: ng.matvec(state, tree), params)[start:end, start:end]
        errors[name] = ng.fisher_error(state, stats)[LAYER].item()
        print(f"{name:16} {errors[name]:.3f}")
    draw(out / "fisher_blocks.png", images, errors, full, (start, end))
    return {"errors": errors, "images": images}


def draw(file: Path, images: dict, errors: dict, full: torch.Tensor, frame: tuple[int, int]) -> None:
    """Draw all images of the layer on one scale, and the whole Fisher on its own scale."""
    figure, axes = plt.subplots(2, 4, figsize=(11, 6), layout="constrained")
    limit = images["sampled Fisher"].abs().quantile(0.99).item()
    for ax, (name, image) in zip(axes.flat, images.items(), strict=False):
        shown = ax.imshow(image.numpy(), cmap="RdBu_r", vmin=-limit, vmax=limit)
        ax.set_title(f"{name}\nerror {errors[name]:.2f}" if name in errors else "Fisher\nof the middle layer")
    figure.colorbar(shown, ax=axes[0, 3], label="entry of F")
    last = axes[1, 3]
    limit = full.abs().quantile(0.99).item()
    last.imshow(full.numpy(), cmap="RdBu_r", vmin=-limit, vmax=limit)
    start, size = frame[0] - 0.5, frame[1] - frame[0]
    last.add_patch(plt.Rectangle((start, start), size, size, fill=False, linewidth=1.5))
    last.set_title("the whole net,\nthe layer framed")
    for ax in axes.flat:
        ax.set_xticks([])
        ax.set_yticks([])
    figure.savefig(file, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "."))
