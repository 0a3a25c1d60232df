r"""The Laplace approximation: a Gaussian posterior over parameters from a method's Fisher, with a prior per block.

Around trained parameters θ, with N examples and the prior $\mathcal N(0, \delta_l^{-1} I)$ on block l,

$$p(\theta \mid D) \approx \mathcal N\bigl(\theta,\; [N (\hat F_l + \lambda_l I)]^{-1}\bigr),
\qquad \lambda_l = \delta_l / N,$$

so the covariance is the damped inverse that preconditions steps, divided by N. The log marginal likelihood is

$$\log p(D \mid \delta) \approx -N L(\theta) - \tfrac12 \sum_l \bigl[\delta_l \|\theta_l\|^2
+ \log\det N(\hat F_l + \lambda_l I) - P_l \log \delta_l\bigr],$$

with L the mean negative log-likelihood and P_l the number of entries. It is differentiable in δ. Constants that the
likelihood leaves out, such as $\log \sqrt{2\pi}\sigma$, are left out here too.

MacKay 1992, *A practical Bayesian framework for backpropagation networks*; Ritter, Botev & Barber 2018, *A scalable
Laplace approximation for neural networks*; Immer et al. 2021, *Scalable marginal likelihood estimation for model
selection in deep learning*.

n example, c and d outputs.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import vmap

from fisherfn import tree
from fisherfn.errors import EmptyBatchError, HyperparameterError, StructureError, expect, expect_count
from fisherfn.linalg import damped
from fisherfn.linalg.damped import Rotated
from fisherfn.linearised import output_covariances
from fisherfn.methods.kronecker import KroneckerMethod
from fisherfn.natgrad import NaturalGradient
from fisherfn.posterior_noise import checked_numbers, normal_numbers
from fisherfn.priors import Prior, block_eigenvalues, most_probable, precisions
from fisherfn.state import State, detached
from fisherfn.stats import Batch
from fisherfn.terms import TermSum
from fisherfn.types import Info, PyTree, Tree


class LaplaceState(NamedTuple):
    """A posterior as a pytree of tensors.

    Attributes:
        params: the mean.
        prior: precision δ of the prior of each block, and of each unused parameter.
        curvature: the state of the method, whose factors are means over all examples so far.
        loss: mean negative log-likelihood of these examples.
        examples: their number N.
    """

    params: Tree
    prior: dict[str, Tensor]
    curvature: State
    loss: Float[Tensor, ""]
    examples: Float[Tensor, ""]


@dataclass(frozen=True)
class Laplace:
    """A Laplace approximation as pure functions of its state. Built by `ff.laplace`.

    Attributes:
        ng: model, likelihood and method.
    """

    ng: NaturalGradient

    def init(self, params: Tree, *, prior: Prior = 1.0) -> LaplaceState:
        """Return the posterior before any example, which is the prior moved to the parameters.

        Args:
            params: trained parameters, the mean of the posterior.
            prior: precision δ > 0, one number, or one per block key of `ng.layout` and per unused parameter.

        Raises:
            HyperparameterError: a precision that is not positive.
            UnknownNameError: no block or unused parameter has this key.
            StructureError: a block or an unused parameter without a precision.
        """
        curvature = self.ng.init(params, damping=1.0)
        curvature = curvature._replace(ema=torch.ones_like(curvature.ema))
        zero = torch.zeros((), dtype=torch.float64, device=curvature.damping.device)
        return LaplaceState(params, precisions(self.ng.layout, prior, zero), curvature, zero, zero)

    def update(
        self, state: LaplaceState, batch: Batch, *, generator: torch.Generator | None = None, context: PyTree = None
    ) -> tuple[LaplaceState, Info]:
        """Add the examples of a batch; if any check fails, return the input state. The result is that of one `fit`.

        Raises:
            StructureError: the method needs all data at once (all but `kfac`).
        """
        _check(state)
        if self.ng.method.fit_passes != 1:
            raise StructureError(
                f"averages of {self.ng.method.name} over batches are not its factors of all examples: pass the whole "
                "data set to posterior.fit, or use ff.kfac."
            )
        stats = self.ng.stats(state.params, batch, generator=generator, context=context)
        curvature, info = self.ng.update(state.curvature, stats)
        total = state.examples + stats.examples
        loss = state.loss + (stats.loss.double() - state.loss) * (stats.examples / total)
        new = state._replace(curvature=curvature, loss=detached(loss, stats.loss), examples=total)
        return tree.select(torch.stack(list(info.ok.values())).all(), new, state), info

    def fit(
        self, params: Tree, loader: Iterable[Batch], *, prior: Prior = 1.0, generator: torch.Generator | None = None,
        context: PyTree = None,
    ) -> tuple[LaplaceState, Info]:  # fmt: skip
        """Return the posterior of a whole data set, by `ng.fit`: the batches do not matter.

        Raises:
            EmptyBatchError: the data set has no batch.
        """
        state = self.init(params, prior=prior)
        curvature, info = self.ng.fit(params, loader, damping=1.0, generator=generator, context=context)
        examples = (curvature.examples * curvature.count).double()
        return state._replace(curvature=curvature, loss=info.loss.double(), examples=examples), info

    def noise(self, generator: torch.Generator, *, samples: int = 1) -> dict[str, Tensor]:
        """Return the noise that `sample` would take from a generator, `[S, …]` per block and per unused parameter."""
        return normal_numbers(self._shapes, generator, samples)

    def sample(
        self, state: LaplaceState, generator: torch.Generator | None = None, *, samples: int | None = None,
        noise: dict[str, Tensor] | None = None,
    ) -> Tree:  # fmt: skip
        """Return parameters sampled from the posterior, a tree like params with the samples as first axis.

        Args:
            state: the posterior.
            generator: random generator; alternatively pass `noise`.
            samples: their number S; default: that of the noise, or 1.
            noise: `noise(generator, samples=S)`, made before the call: for `torch.vmap` and compiled functions.

        Raises:
            HyperparameterError: fewer than one sample.
            NoiseError: neither `generator` nor `noise`, or a generator inside `torch.vmap`.
            StructureError, ShapeError: noise of other blocks, or of another number of samples.
        """
        _check(state)
        noise = checked_numbers(self._shapes, noise, generator, samples)
        roots, layout, N = {}, self.ng.layout, state.examples.clamp(min=1)
        for key, inverse in self._inverses(state).items():
            scaled = noise[key].to(inverse.scale) * (inverse.scale / N).sqrt()
            roots[key] = vmap(lambda W, inverse=inverse: damped.rotated_back(inverse, W))(scaled)
        deviations = vmap(lambda one: layout.cast(layout.tree(one)))(roots)
        for name in layout.unused:  # the data say nothing about it
            deviations[name] = (noise[name].to(state.prior[name]) / state.prior[name].sqrt()).to(deviations[name])
        return {name: state.params[name] + deviation for name, deviation in deviations.items()}

    # the evidence ----------------------------------------------------------------------------------------------------

    def log_marginal_likelihood(self, state: LaplaceState, prior: Prior | None = None) -> Float[Tensor, ""]:
        """Return log p(D | δ) in float64, differentiable in the prior.

        Args:
            state: the posterior.
            prior: another precision δ; None: that of the state.

        Raises:
            EmptyBatchError: the state has seen no example.
            HyperparameterError: a precision that is not positive; inside `torch.vmap` the result is NaN or infinite.
        """
        _check(state)
        _check_seen(state)
        state = state if prior is None else state._replace(prior=precisions(self.ng.layout, prior, state.examples))
        mean, N = self._blocks(state.params), state.examples
        terms = []
        for key, inverse in self._inverses(state).items():
            δ, size = state.prior[key], mean[key].numel()
            occam = size * (N.log() - δ.log()) - damped.logdet(inverse)
            terms.append(δ * mean[key].square().sum() + occam)
        return -N * state.loss - torch.stack(terms).sum() / 2

    def choose_prior(self, state: LaplaceState, *, per_block: bool = True, iterations: int = 50) -> LaplaceState:
        r"""Return the state with the prior that maximises the evidence, at MacKay's fixed point.

        There $\delta = \gamma / \|\theta\|^2$, where $\gamma = P - \lambda\, \mathrm{tr} (\hat F + \lambda I)^{-1}$ is
        the number of parameters that the data determine. Each iteration at least halves the distance to it in log δ;
        for methods with two products this is not proven. A block that is zero, or about which the data say nothing, has
        no such point and keeps its prior.

        Args:
            state: the posterior.
            per_block: one precision per block, while unused parameters keep theirs; False: one for all.
            iterations: number of updates.

        Raises:
            HyperparameterError: fewer than one iteration.
            EmptyBatchError: the state has seen no example.
        """
        _check(state)
        _check_seen(state)
        expect_count("iterations", iterations)
        method: Any = self.ng.method
        shapes = self.ng.layout.block_shapes
        spectra = {key: block_eigenvalues(method, each, shapes[key]) for key, each in _in_double(state).items()}
        squares = {key: W.square().sum() for key, W in self._blocks(state.params).items()}
        return state._replace(prior=most_probable(spectra, squares, state.prior, state.examples, iterations, per_block))

    # predictions -----------------------------------------------------------------------------------------------------

    def predict(
        self, state: LaplaceState, x: PyTree, *, context: PyTree = None, chunk_size: int | None = None
    ) -> tuple[Tensor, Float[Tensor, "n c d"]]:
        """Return the outputs `[n, c]` and their covariances under the posterior, with the model linearised in θ.

        Outputs of several axes are flattened. The noise of the likelihood is not included. `chunk_size` limits the
        examples whose Jacobians are in memory. Each is run alone, with its own entries of the context (dropout seeds).

        Raises:
            StructureError, ShapeError: examples or a context that differ from the build.
            HyperparameterError: a `chunk_size` below one.
            ModelError: a model that does not run on single examples (batch norm in training mode).
        """
        _check(state)
        if chunk_size is not None:
            expect_count("chunk_size", chunk_size)
        ng, N = self.ng, state.examples.clamp(min=1)
        scaled = {key: each._replace(scale=each.scale / N) for key, each in self._inverses(state).items()}
        covariances = {key: partial(damped.apply, inverse) for key, inverse in scaled.items()}
        return output_covariances(ng.model, ng.layout, state.params, covariances, x, context, chunk_size)

    # ---------------------------------------------------------------------------------------------------------

    def _inverses(self, state: LaplaceState) -> dict[str, Rotated]:
        """Return `(F̂ + δ/N)⁻¹` of every block, in float64; before the first example N counts as 1."""
        method: Any = self.ng.method
        N = state.examples.clamp(min=1)
        return {key: method.invert_block(each, state.prior[key] / N)[0] for key, each in _in_double(state).items()}

    @property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the blocks and of the unused parameters."""
        unused = {name: tuple(shape) for name, shape in self.ng.layout.shapes if name in self.ng.layout.unused}
        return {key: shape[:3] for key, shape in self.ng.layout.block_shapes.items()} | unused

    def _blocks(self, params: Tree) -> dict[str, Tensor]:
        return {key: W.double() for key, W in self.ng.layout.matrices(params).items()}


def laplace(ng: NaturalGradient) -> Laplace:
    """Build a Laplace approximation: pure functions `init`, `update` (or `fit`) and `sample`, evidence and predictions.

    Args:
        ng: a natural gradient with a Kronecker method and `damping_form="eigen"`, which adds exactly the prior. Methods
            with two products (`lanczos`, `deflation`, `kfac_corrected`) approximate N F̂ + δ I: it has no common
            eigenvectors with both products, so only the diagonal of the second one in the eigenvectors of the first is
            kept, as in their steps.

    Raises:
        StructureError: not a natural gradient, or a sum of terms; no Kronecker factors; parameters in no block.
        HyperparameterError: factored damping, which is not a prior.
    """
    expect(ng, NaturalGradient, "ng", "pass what ff.natural_gradient(…) returned")
    if isinstance(ng, TermSum):
        raise StructureError(
            "a sum of terms has no single number N of examples: pass the natural gradient of one likelihood; "
            "ff.Weighted gives its examples weights."
        )
    method = ng.method
    if not isinstance(method, KroneckerMethod):
        raise StructureError(
            f"{method.name} has no Kronecker factors to sample from: use kfac, ekfac, kpsvd or another block method."
        )
    if method.damping_form != "eigen":
        raise HyperparameterError(
            f"the prior adds δ I to the precision, and the factored damping of this {method.name} adds another matrix: "
            'use ff.kfac("eigen") or another Kronecker method that takes damping_form="eigen".'
        )
    if ng.layout.uncovered:
        raise StructureError('some parameters are in no block: build with uncovered="fallback".')
    return Laplace(ng)


def _in_double(state: LaplaceState) -> dict[str, PyTree]:
    return {key: damped.in_double(factors) for key, factors in state.curvature.factors.items()}


def _check(state: LaplaceState) -> None:
    expect(state, LaplaceState, "state", "pass what posterior.init, posterior.update or posterior.fit returned")


def _check_seen(state: LaplaceState) -> None:
    """Raise if the state is known to have seen no example; inside a transform the result is then not finite."""
    if torch._C._functorch.maybe_current_level() is None and not bool(state.examples > 0):
        raise EmptyBatchError("the posterior has seen no example: call posterior.update or posterior.fit first.")
