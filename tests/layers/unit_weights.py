"""Every layer's tap by its definition, and K-FAC from it. Nothing here imports fisherfn.

A layer is linear in its weight: position t of a group's output is s_t = W a_t (+ b). So entry i of `a_t` is what the
layer puts out, in the group's channel 0, when its weight is zero but for one entry: torch's own layer is asked, nothing
is unfolded.

k group, s draw, n example, t position, i input, o output.
"""

import torch
from torch import nn
from torch.func import functional_call

from tests import oracles

CONV = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
CONV_TRANSPOSE = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
ENTRYWISE = (nn.LayerNorm, nn.RMSNorm)
CHANNELWISE = (nn.GroupNorm, nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)
LAYERS = (nn.Linear, *CONV, *CONV_TRANSPOSE, *ENTRYWISE, *CHANNELWISE, nn.Embedding)


def matrix_index(module):
    """Where the entries of W `[K, o, i]` lie in the flat weight."""
    weight = module.weight
    index = torch.arange(weight.numel())
    if isinstance(module, CONV):
        return index.reshape(module.groups, weight.shape[0] // module.groups, -1)
    if isinstance(module, CONV_TRANSPOSE):  # stored [C_in, C_out / G, k…]
        per_group = index.reshape(module.groups, -1, weight.shape[1], weight[0, 0].numel())
        return per_group.transpose(1, 2).flatten(2)
    if isinstance(module, nn.Embedding):  # stored [V, E]
        return index.reshape(1, *weight.shape).mT
    return index.reshape(1, *weight.shape) if isinstance(module, nn.Linear) else index.reshape(-1, 1, 1)


def as_kto(module, out):
    """One example's output, or its gradient, `[1, …]` as `[K, T, o]`."""
    if isinstance(module, (nn.Linear, nn.Embedding)):
        return out.reshape(1, -1, out.shape[-1])
    if isinstance(module, ENTRYWISE):
        return out.reshape(-1, module.weight.numel()).T.unsqueeze(-1)
    groups = module.groups if isinstance(module, (*CONV, *CONV_TRANSPOSE)) else out.shape[1]
    return out.reshape(groups, out.shape[1] // groups, -1).mT


def unit_rows(module, x, **keywords):
    """a `[K, T, i]`: the response to one unit weight at a time."""
    index, zero = matrix_index(module), torch.zeros(module.weight.numel(), dtype=torch.float64)
    rows = []
    for i in range(index.shape[-1]):
        weight = zero.index_fill(0, index[:, 0, i], 1.0).reshape(module.weight.shape)
        bias = {} if getattr(module, "bias", None) is None else {"bias": torch.zeros_like(module.bias)}
        rows.append(as_kto(module, functional_call(module, {"weight": weight, **bias}, (x,), keywords))[..., 0])
    a = torch.stack(rows, dim=-1).detach()
    if isinstance(module, nn.Embedding) and module.padding_idx is not None:
        a[..., module.padding_idx] = 0.0  # used, but not trained
    return a


def layers_io(problem, params, x):
    """The model's outputs, and every use of a trained layer: its input, its keywords, its output."""
    modules = {
        name: m for name, m in problem.net.named_modules() if isinstance(m, LAYERS) and f"{name}.weight" in params
    }
    seen, hooks = {name: [] for name in modules}, []
    for name, module in modules.items():
        record = lambda mod, args, kw, out, name=name: seen[name].append((args[0].detach(), kw, out))  # noqa: E731
        hooks.append(module.register_forward_hook(record, with_kwargs=True))
    outputs = problem.model(params, x)
    for hook in hooks:
        hook.remove()
    return outputs, seen, modules


def taps(problem, fisher, draws=None):
    """{layer: (a [K, N, T, i], g [K, N, S, T, o])}: one example at a time; a trained bias appends 1 to a."""
    params, collected = oracles.leaves(problem.params), {}
    for n in range(len(problem.x)):
        outputs, seen, modules = layers_io(problem, params, problem.x[n : n + 1])
        terms = oracles.scalars(problem, outputs, n, fisher, draws)
        for name, uses in seen.items():
            module = modules[name]
            a_kti = torch.cat([unit_rows(module, x, **kw) for x, kw, _ in uses], dim=1)
            if f"{name}.bias" in params:
                a_kti = torch.cat([a_kti, torch.ones_like(a_kti[..., :1])], dim=-1)
            grads = [torch.autograd.grad(term, [out for *_, out in uses], retain_graph=True) for term in terms]
            g_ksto = torch.stack([torch.cat([as_kto(module, g) for g in gs], dim=1) for gs in grads], dim=1)
            collected.setdefault(name, []).append((a_kti, g_ksto))
    return {name: tuple(torch.stack(rows, 1) for rows in zip(*pairs, strict=True)) for name, pairs in collected.items()}


def positions(problem, name):
    """Where the entries of W = [weight | bias] `[K, o, i]` lie in vec(params)."""
    total = sum(leaf.numel() for leaf in problem.params.values())
    where = oracles.unvec(problem.params, torch.arange(total))
    at = where[f"{name}.weight"].reshape(-1)[matrix_index(problem.net.get_submodule(name))]
    if f"{name}.bias" not in where:
        return at
    return torch.cat([at, where[f"{name}.bias"].reshape(*at.shape[:2], 1)], dim=-1)


# ------------------------------------------------------------------------------------------------------- K-FAC


def factors(a_nti, g_nsto, sharing="expand"):
    """One group. Expand: A = 1/N Σ aaᵀ, G = 1/(NT) Σ ggᵀ. Reduce: of ā = mean_t a and ĝ = Σ_t g, each a mean over n."""
    if sharing == "reduce":
        a_nti, g_nsto = a_nti.mean(1, keepdim=True), g_nsto.sum(2, keepdim=True)
    return oracles.kfac_factors(a_nti, g_nsto)


def kfac_factors(problem, fisher, draws=None, sharing="expand", diagonal_above=8192):
    """{layer: [(A, G) of each group]}; a factor wider than the limit, or of an embedding's inputs, is its diagonal."""
    found = {}
    for name, (a, g) in taps(problem, fisher, draws).items():
        words = isinstance(problem.net.get_submodule(name), nn.Embedding)
        pairs = [factors(a[k], g[k], sharing) for k in range(len(a))]
        found[name] = [
            (
                A.diagonal().diag() if words or len(A) > diagonal_above else A,
                G.diagonal().diag() if len(G) > diagonal_above else G,
            )
            for A, G in pairs
        ]
    return found


def kfac_dense(problem, layer_factors, block):
    """The layers' dense matrix in params order, `block(A, G)` for each group; zero where no layer is."""
    total = sum(leaf.numel() for leaf in problem.params.values())
    dense = torch.zeros(total, total, dtype=torch.float64)
    for name, groups in layer_factors.items():
        for at, (A, G) in zip(positions(problem, name).flatten(1), groups, strict=True):
            dense[at[:, None], at] = block(A, G)
    return dense
