r"""K-FAC with one Kronecker product per term of the loss: $F \approx w_1\, G_1 \otimes A_1 + w_2\, G_2 \otimes A_2$.

For a sum of terms, such as the residuals and the boundary values of a physics-informed net, K-FAC takes the examples of
all terms as one batch. It then pairs the mean input moment of all terms with their mean output moment, although inputs
and output-gradients of the terms differ in size by orders of magnitude. Here each term has its own pair of moments, and
the sum of both products is inverted exactly (`fisherfn.linalg.damped`). The first term is damped. With three or more
terms, all but the first share one product.

Scale and running average of each product are those of K-FAC, with the weight of its term in the loss in G. A loss with
one term gives K-FAC itself.

Dangel, Müller & Zeinhofer 2024, *Kronecker-factored approximate curvature for physics-informed neural networks*,
section 3.3.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fisherfn import tree
from fisherfn.joined import JoinedTap
from fisherfn.linalg.damped import FLOOR
from fisherfn.linalg.kron import DIAGONAL_ABOVE, Pair, Sum
from fisherfn.methods.kfac import moments
from fisherfn.methods.kronecker import TwoTerms
from fisherfn.taps import AnyTap


@dataclass(frozen=True)
class KFACByTerm(TwoTerms):
    """K-FAC with one product per term of the loss. Built by `ff.kfac_by_term`, which has the argument."""

    name = "kfac_by_term"
    fit_passes = 1

    def estimate(self, tap: AnyTap, previous: Sum) -> Sum:
        """Return the moments of the first term and of the others; zeros if there is only one."""
        if not isinstance(tap, JoinedTap) or len(tap.parts) == 1:
            return Sum(moments(tap, self.diagonal_above), tree.map(torch.zeros_like, previous.second))
        first, others = (tap.of_parts(chosen) for chosen in (slice(1), slice(1, None)))
        return Sum(*(self._share(part, tap.sizes.n) for part in (first, others)))

    def _share(self, part: JoinedTap, examples: int) -> Pair:
        """Return the moments of some terms, as their part of the mean over the examples of all terms."""
        A, G = moments(part, self.diagonal_above)
        return Pair(A, G * (part.sizes.n / examples))


def kfac_by_term(diagonal_above: int = DIAGONAL_ABOVE) -> KFACByTerm:
    """Build K-FAC with one Kronecker product per term, for `ff.sum_of_terms`; its damping is "factored".

    Args:
        diagonal_above: a factor wider than this is kept as its diagonal.

    Raises:
        HyperparameterError: a negative width.
    """
    return KFACByTerm("factored", diagonal_above, FLOOR)
