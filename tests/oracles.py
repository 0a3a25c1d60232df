"""Brute force: everything by its definition, one example at a time, with plain autograd and torch.distributions.

Nothing here imports fisherfn: oracle and library share no line. A `problem` is a case of tests/zoo.py.
Index legend: n example, s draw (or column of the output Fisher), t position, i in, o out, p parameter entry.

    vec    entries of a tree in params order, each tensor row-major
    U      [P, S*N], column s*N + n, so that F = U Uᵀ (the 1/N of the mean is inside)
"""

import torch
from torch import nn

# ---------------------------------------------------------------------------------------------------- vectors


def vec(tree):
    return torch.cat([leaf.reshape(-1) for leaf in tree.values()])


def unvec(like, vector):
    pieces = vector.split([leaf.numel() for leaf in like.values()])
    return {name: piece.reshape(leaf.shape) for (name, leaf), piece in zip(like.items(), pieces, strict=True)}


def positions(params, names):
    """Where the entries of `names` lie in vec(params)."""
    index = unvec(params, torch.arange(sum(leaf.numel() for leaf in params.values())))
    return torch.cat([index[name].reshape(-1) for name in names])


def matrix_positions(params, names):
    """Where the entries of W = [weight | bias], row-major, lie in vec(params)."""
    index = unvec(params, torch.arange(sum(leaf.numel() for leaf in params.values())))
    columns = [index[name].reshape(index[name].shape[0], -1) for name in names]
    return torch.cat(columns, dim=1).reshape(-1)


def block_diagonal(params, blocks, dense):
    """Keep the entries (p, q) whose parameters lie in one block."""
    kept = torch.zeros_like(dense)
    for names in blocks.values():
        at = positions(params, names)
        kept[at[:, None], at] = dense[at[:, None], at]
    return kept


# ----------------------------------------------------------------------------------------- one example at a time


def nll(problem, outputs, targets):
    """-log p(targets | outputs), summed over everything."""
    return -problem.density(outputs).log_prob(targets).sum()


def leaves(params):
    return {name: leaf.detach().clone().requires_grad_() for name, leaf in params.items()}


def gradient(scalar, params):
    grads = torch.autograd.grad(scalar, list(params.values()), retain_graph=True, allow_unused=True)
    pairs = zip(grads, params.values(), strict=True)
    return torch.cat([(torch.zeros_like(leaf) if g is None else g).reshape(-1) for g, leaf in pairs])


def output_fisher(problem, outputs):
    """E_y of the NLL's Hessian in the outputs. The NLLs of the zoo are linear in y, or their Hessian is free of y."""
    mean = problem.any_target(outputs.detach())
    hessian = torch.autograd.functional.hessian(lambda out: nll(problem, out, mean), outputs.detach())
    return hessian.reshape(outputs.numel(), outputs.numel())


def output_fisher_columns(problem, outputs):
    values, vectors = torch.linalg.eigh(output_fisher(problem, outputs))
    return (vectors * values.clamp(min=0).sqrt()).T.reshape(-1, *outputs.shape)


def scalars(problem, outputs, n, fisher, draws=None):
    """Scalars of one example's graph whose gradients are the columns of its Fisher: Σ_s ∇ ∇ᵀ = F_n."""
    if fisher == "empirical":
        return [nll(problem, outputs, problem.y[n : n + 1])]
    if fisher == "mc":
        return [nll(problem, outputs, targets[n : n + 1]) / len(draws) ** 0.5 for targets in draws]
    return [(column * outputs).sum() for column in output_fisher_columns(problem, outputs)]


def columns(problem, fisher, draws=None):
    """U with F = U Uᵀ."""
    params, size = leaves(problem.params), len(problem.x)
    per_example = []
    for n in range(size):
        outputs = problem.model(params, problem.x[n : n + 1])
        grads = [gradient(scalar, params) for scalar in scalars(problem, outputs, n, fisher, draws)]
        per_example.append(torch.stack(grads))  # [S, P]
    U_snp = torch.stack(per_example, dim=1)
    return U_snp.flatten(0, 1).T / size**0.5


def fisher_matrix(problem, fisher, draws=None):
    U = columns(problem, fisher, draws)
    return U @ U.T


def mean_nll(problem, params=None):
    params = problem.params if params is None else params
    terms = [nll(problem, problem.model(params, x[None]), y[None]) for x, y in zip(problem.x, problem.y, strict=True)]
    return sum(terms) / len(terms)


def mean_gradient(problem):
    params = leaves(problem.params)
    return unvec(problem.params, gradient(mean_nll(problem, params), params))


# ------------------------------------------------------------------------------------------------------- K-FAC


def linear_io(problem, params, x):
    """Inputs and output nodes of every trained nn.Linear, one pair a use."""
    modules = {
        name: m for name, m in problem.net.named_modules() if isinstance(m, nn.Linear) and f"{name}.weight" in params
    }
    seen, hooks = {name: [] for name in modules}, []
    for name, module in modules.items():
        record = lambda mod, args, out, name=name: seen[name].append((args[0], out))  # noqa: E731
        hooks.append(module.register_forward_hook(record))
    outputs = problem.model(params, x)
    for hook in hooks:
        hook.remove()
    return outputs, seen


def taps(problem, fisher, draws=None):
    """{layer: (a [N, T, i], g [N, S, T, o])} by hooks and autograd; a bias appends 1 to a, a further use positions."""
    params = leaves(problem.params)
    collected = {}
    for n in range(len(problem.x)):
        outputs, seen = linear_io(problem, params, problem.x[n : n + 1])
        terms = scalars(problem, outputs, n, fisher, draws)
        for name, uses in seen.items():
            a_ti = torch.cat([a.detach().flatten(0, -2) for a, _ in uses])
            if f"{name}.bias" in params:
                a_ti = torch.cat([a_ti, torch.ones_like(a_ti[:, :1])], dim=1)
            nodes = [out for _, out in uses]
            grads = [torch.autograd.grad(term, nodes, retain_graph=True) for term in terms]
            g_sto = torch.stack([torch.cat([g.flatten(0, -2) for g in gs]) for gs in grads])
            collected.setdefault(name, []).append((a_ti, g_sto))
    return {name: tuple(map(torch.stack, zip(*rows, strict=True))) for name, rows in collected.items()}


def kfac_factors(a_nti, g_nsto):
    """A = 1/N Σ_nt a aᵀ,  G = 1/(NT) Σ_nst g gᵀ."""
    size, length = a_nti.shape[:2]
    A = sum(torch.outer(a, a) for a in a_nti.flatten(0, 1)) / size
    G = sum(torch.outer(g, g) for g in g_nsto.flatten(0, 2)) / (size * length)
    return A, G


def kfac_block(A, G):
    """F ≈ G ⊗ A for row-major vec(W): W ↦ G W A."""
    return torch.kron(G, A)


def kfac_damped(A, G, damping, form):
    """The dense matrix that the K-FAC step inverts."""
    eye_i, eye_o = torch.eye(len(A), dtype=A.dtype), torch.eye(len(G), dtype=G.dtype)
    if form == "eigen":
        return torch.kron(G, A) + damping * torch.kron(eye_o, eye_i)
    pi = ((A.trace() / len(A)) / (G.trace() / len(G))) ** 0.5
    return torch.kron(G + damping**0.5 / pi * eye_o, A + pi * damping**0.5 * eye_i)


def kfac_dense(problem, factors, block):
    """One block per layer, in params order: `block(A, G)` is the layer's dense matrix."""
    total = sum(leaf.numel() for leaf in problem.params.values())
    dense = torch.zeros(total, total, dtype=torch.float64)
    for name, (A, G) in factors.items():
        at = matrix_positions(problem.params, problem.blocks[name])
        dense[at[:, None], at] = block(A, G)
    return dense


def kfac_of(problem, fisher, draws=None):
    return {name: kfac_factors(a, g) for name, (a, g) in taps(problem, fisher, draws).items()}


# ------------------------------------------------------------------------------------------------- comparison


def close(actual, expected, tol=1e-8):
    """Equal relative to the largest entry; trees by path; a failure prints where and by which ratio."""
    if isinstance(expected, dict):
        assert actual.keys() == expected.keys(), f"{sorted(actual)} != {sorted(expected)}"
        for key in expected:
            close(actual[key], expected[key], tol)
        return
    actual, expected = torch.as_tensor(actual), torch.as_tensor(expected)
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)} != {tuple(expected.shape)}"
    if not expected.numel():
        return
    error = (actual.double() - expected.double()).abs()
    scale = expected.double().abs().max().clamp(min=1e-30)
    at = int(error.argmax())
    got, want = actual.reshape(-1)[at].item(), expected.reshape(-1)[at].item()
    assert bool((error <= tol * scale).all()), (
        f"relative error {(error.max() / scale).item():.2e} > {tol:.0e} at flat index {at} of {tuple(actual.shape)}: "
        f"{got:.10g} instead of {want:.10g}, ratio {got / want if want else float('nan'):.6g}"
    )


def differs(actual, expected, tol=1e-6):
    """Not equal: the guard that a comparison is not between two zeros or two copies."""
    scale = expected.double().abs().max().clamp(min=1e-30)
    return bool((actual.double() - expected.double()).abs().max() > tol * scale)
