"""Brute force for Kronecker approximations: the dense block, its rearrangement, and the SVD of that.

Nothing here imports fisherfn: oracle and library share no line. Arguments are one group's tensors: `a [N, T, i]`,
`g [S, N, T, o]`, or a dense block `F [o·i, o·i]`, whose rows run over vec(W) of `W [o, i]`, row-major; in it a
Kronecker product acting as W ↦ G W A is kron(G, A).

Van Loan & Pitsianis 1993: the rearrangement `Z [i·i, o·o]` turns kron(G, A) into vec(A) vec(G)ᵀ, so that the distance
of F to sums of R Kronecker products is that of Z to matrices of rank R.
"""

import torch

# -------------------------------------------------------------------------------------------------------- blocks


def example_matrices(a, g):
    """W_sn = Σ_t g aᵀ, `[S·N, o, i]`, one outer product at a time."""
    draws, examples, length = g.shape[:3]
    return torch.stack(
        [sum(torch.outer(g[s, n, t], a[n, t]) for t in range(length)) for s in range(draws) for n in range(examples)]
    )


def block(a, g):
    """F = 1/N Σ_sn vec(W) vec(W)ᵀ."""
    rows = example_matrices(a, g).flatten(1)
    return rows.T @ rows / len(a)


def kfac_pair(a, g):
    """A = 1/N Σ aaᵀ, G = 1/(NT) Σ ggᵀ."""
    a_rows, g_rows = a.flatten(0, 1), g.flatten(0, 2)
    return a_rows.T @ a_rows / len(a), g_rows.T @ g_rows / len(a_rows)


def matrix(factor):
    """A factor, or the matrix of its diagonal."""
    return torch.diag(factor) if factor.ndim == 1 else factor


def kron(A, G):
    """The dense matrix of W ↦ G W A."""
    return torch.kron(matrix(G).contiguous(), matrix(A).contiguous())


def kron_sum(*pairs):
    return sum(kron(A, G) for A, G in pairs)


# ------------------------------------------------------------------------------------------------- rearrangement


def rearranged(F, o, i):
    """Z[(j, l), (p, q)] = F[(p, j), (q, l)], entry by entry of W."""
    Z = F.new_zeros(i * i, o * o)
    for p in range(o):
        for q in range(o):
            Z[:, p * o + q] = F[p * i : (p + 1) * i, q * i : (q + 1) * i].reshape(-1)
    return Z


def put_back(Z, o, i):
    """The inverse of `rearranged`."""
    F = Z.new_zeros(o * i, o * i)
    for p in range(o):
        for q in range(o):
            F[p * i : (p + 1) * i, q * i : (q + 1) * i] = Z[:, p * o + q].reshape(i, i)
    return F


def basis(d, kind):
    """Orthonormal rows that span the matrices of a kind: "all", "symmetric", "antisymmetric" or "diagonal"."""
    eye, root, rows = torch.eye(d * d, dtype=torch.float64), 0.5**0.5, []
    for p in range(d):
        for q in range(p, d):
            pq, qp = eye[p * d + q], eye[q * d + p]
            if p == q:
                rows += [] if kind == "antisymmetric" else [pq]
            else:
                both = {"symmetric": [root * (pq + qp)], "antisymmetric": [root * (pq - qp)], "all": [pq, qp]}
                rows += both.get(kind, [])
    return torch.stack(rows) if rows else eye[:0]


def spectrum(F, o, i, kind="all", kind_o=None):
    """SVD of the rearrangement between input factors of one kind and output factors of another (default: the same).

    Returns the triplets as matrices, `σ [R]`, `A [R, i, i]`, `G [R, o, o]`, and the part of Z outside of those kinds.
    """
    U, V = basis(i, kind), basis(o, kind_o or kind)
    Z = rearranged(F, o, i)
    inside = U @ Z @ V.T
    left, sigma, right = torch.linalg.svd(inside, full_matrices=False)
    A, G = (left.T @ U).reshape(-1, i, i), (right @ V).reshape(-1, o, o)
    return sigma, A, G, Z - U.T @ inside @ V


def optimum(F, o, i, rank, kind="symmetric", kind_o=None):
    """Least ‖F − Σ_r kron(G_r, A_r)‖_F over `rank` pairs of such factors: a tail, so that nothing cancels."""
    sigma, _, _, outside = spectrum(F, o, i, kind, kind_o)
    return (outside.square().sum() + sigma[rank:].square().sum()).sqrt()


def best(F, o, i, rank, kind="symmetric", kind_o=None):
    """The dense matrix that attains the optimum."""
    sigma, A, G, _ = spectrum(F, o, i, kind, kind_o)
    return sum(sigma[r] * kron(A[r], G[r]) for r in range(min(rank, len(sigma)))) + torch.zeros_like(F)


# ----------------------------------------------------------------------------------------------- sums and damping


def damped_pair(A, G, damping):
    """A + π√λ I and G + √λ/π I, with π = √((tr A / i) / (tr G / o)); π = 1 where a factor is zero."""
    A, G = matrix(A), matrix(G)
    a, g = A.trace() / len(A), G.trace() / len(G)
    pi = (a / g).sqrt() if a > 0 and g > 0 else 1.0
    eye_i, eye_o = torch.eye(len(A), dtype=A.dtype), torch.eye(len(G), dtype=G.dtype)
    return A + pi * damping**0.5 * eye_i, G + damping**0.5 / pi * eye_o


def power(M, exponent):
    """M^exponent of a symmetric positive definite matrix."""
    values, vectors = torch.linalg.eigh(M)
    return (vectors * values**exponent) @ vectors.T


def relative_spectrum(B, C):
    """Spectrum of I + B^-½ C B^-½: how much C changes B, direction by direction, and the directions (columns)."""
    half = power(B, -0.5)
    eye = torch.eye(len(B), dtype=B.dtype)
    return torch.linalg.eigh(eye + half @ C @ half)


def floored_sum(B, C, floor):
    """B + C with its spectrum relative to B clipped from below. No Kronecker structure is used."""
    values, vectors = relative_spectrum(B, C)
    half = power(B, 0.5)
    return half @ (vectors * values.clamp(min=floor)) @ vectors.T @ half


def eigenbasis(A, G):
    """Eigenvalues r of A and s of G, and the columns of the basis Q_G ⊗ Q_A; that of a diagonal is the identity."""
    parts = []
    for factor in (A, G):
        eye = torch.eye(factor.shape[-1], dtype=factor.dtype)
        parts.append((factor, eye) if factor.ndim == 1 else torch.linalg.eigh(factor))
    (r, QA), (s, QG) = parts
    return r, s, torch.kron(QG.contiguous(), QA.contiguous())


def diagonal_in(Q, F):
    """diag(Qᵀ F Q), one quadratic form at a time."""
    return torch.stack([q @ F @ q for q in Q.T])
