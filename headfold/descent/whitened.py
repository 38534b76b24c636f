"""The steps of a descent: Adam (Kingma & Ba 2015, 1412.6980) in coordinates in which the inputs of a projection are white.

Where C = E x xᵀ for inputs x, the coordinates of W are Z = W C^½: a step there changes the output as much along every direction of the
inputs, so directions with little energy are not the last to be fitted (the right factor of K-FAC, Martens & Grosse 2015, 1503.05671).
The outputs of each head are rotated to the eigenbasis of the second moments of their gradients (SOAP, Vyas et al. 2024, 2409.11321).
"""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from .kronecker import damped

BETAS = (0.9, 0.95)
_DAMPING = 1e-3
"""Added to C, relative to its mean energy."""
_TURNED_EVERY = 4
"""Steps between two eigenbases of the outputs, which change slowly."""
_EPSILON = 1e-16
"""Added to the root of Adam's second moment, far below any gradient whose square float32 holds."""


def whitening(second: Float[Tensor, "size size"]) -> tuple[Float[Tensor, "size size"], Float[Tensor, "size size"]]:
    """Return C^-½ and C^½ up to a common rotation, that of the eigenbasis: gradients times the first are those of W times the second."""
    energies, turn = torch.linalg.eigh(damped(second.double(), _DAMPING))
    root = energies.clamp_min(torch.finfo(torch.float32).tiny).sqrt()
    return turn / root, turn * root


class _Trained:
    """One tensor of a site, with the moments of its gradients; `white` is the whitening of its inputs, None where they stay as they are,
    and `scale` how far a step at rate 1 moves it then.
    """

    def __init__(self, leaf: Tensor, white: tuple[Tensor, Tensor] | None, scale: float, *, is_output: bool) -> None:
        self._leaf, self._is_output, self._steps = leaf, is_output, 0
        self._into: Tensor | None = None
        self._scale = scale
        if white is not None:
            self._into, root = white
            self._scale = _root_mean_square(self._times(leaf.detach(), root))
        self.forget()

    def forget(self) -> None:
        """Forget all gradients."""
        self._steps = 0
        self._mean: Tensor | None = None
        self._square: Tensor | None = None
        self._rows: Tensor | None = None
        self._turn: Tensor | None = None

    def _times(self, weights: Tensor, matrix: Tensor) -> Tensor:
        """Return W times a matrix over its inputs; those of the output projection come first."""
        return matrix.mT @ weights.flatten(0, 1) if self._is_output else weights @ matrix

    def see(self, gradient: Tensor, *, evenly: bool) -> None:
        """Add a gradient to the moments."""
        here = gradient if self._into is None else self._times(gradient, self._into)
        if self._into is not None and not self._is_output:
            here = self._turned(here)
        self._steps += 1
        if self._mean is None or self._square is None:
            self._mean, self._square = torch.zeros_like(here), torch.zeros_like(here)
        # With weights that make up for the zeros at the start, so that nothing is left to correct; or the plain mean.
        first, second = (1 - 1 / self._steps if evenly else (b - b**self._steps) / (1 - b**self._steps) for b in BETAS)
        self._mean.mul_(first).add_(here, alpha=1 - first)
        self._square.mul_(second).addcmul_(here, here, value=1 - second)

    def _turned(self, gradient: Float[Tensor, "head dim size"]) -> Float[Tensor, "head dim size"]:
        """Return the gradient in the eigenbasis of its rows' second moments, and take the first moment to that basis."""
        rows, keep = gradient @ gradient.mT, BETAS[1]
        self._rows = rows if self._rows is None else keep * self._rows + (1 - keep) * rows
        if self._steps % _TURNED_EVERY == 0:
            turn = torch.linalg.eigh(self._rows.double())[1].to(gradient)
            if self._mean is not None and self._turn is not None:
                self._mean = turn.mT @ (self._turn @ self._mean)
            self._turn = turn
        assert self._turn is not None
        return self._turn.mT @ gradient

    def direction(self) -> Tensor:
        """Return Adam's step at rate 1: each coordinate moves by about the root mean square of all."""
        assert self._mean is not None and self._square is not None
        step = (self._mean / self._square.sqrt().add_(_EPSILON)).mul_(self._scale)
        if self._turn is not None:
            step = self._turn @ step
        if self._into is not None:
            step = self._into @ step if self._is_output else step @ self._into.mT
        return step.view_as(self._leaf)


def _root_mean_square(tensor: Tensor) -> float:
    return float(tensor.detach().double().square().mean().sqrt())


class WhitenedAdam:
    """Moves tensors of one site or several against their gradients."""

    def __init__(self, sites: Sequence[tuple[Mapping[str, Tensor], Mapping[str, Tensor]]]) -> None:
        """`sites` are the trained tensors of each by field, and the second moments of their inputs: of `q`, `v` (and `k`), and `o`; of what
        has none, coordinates stay as they are.
        """
        self._tensors: list[Tensor] = []
        self._trained: list[_Trained] = []
        for leaves, seconds in sites:
            whitenings: dict[tuple[str, int], tuple[Tensor, Tensor]] = {}
            for field, leaf in leaves.items():
                role, size = "v" if field == "k" else field, leaf.shape[-1]
                second = seconds.get(role)
                if second is not None and (role, size) not in whitenings:
                    part = second if field == "o" else second[:size, :size]
                    into, root = whitening(part)
                    whitenings[role, size] = into.to(leaf), root.to(leaf)
                scale = _root_mean_square(leaves["o"] if field == "o_bias" else leaf)
                self._tensors.append(leaf)
                self._trained.append(_Trained(leaf, whitenings.get((role, size)), scale, is_output=field == "o"))

    def see(self, gradients: Sequence[Tensor], *, evenly: bool = False) -> None:
        """Add gradients of all tensors, in their order, to the moments: `evenly` as much as each before, else Adam's way."""
        for each, gradient in zip(self._trained, gradients, strict=True):
            each.see(gradient, evenly=evenly)

    def directions(self) -> list[Tensor]:
        """Return the step of every tensor at rate 1."""
        return [each.direction() for each in self._trained]

    def weights(self) -> list[Tensor]:
        """Return a copy of all tensors."""
        return [leaf.detach().clone() for leaf in self._tensors]

    def set(self, weights: Sequence[Tensor]) -> None:
        """Set all tensors."""
        for leaf, value in zip(self._tensors, weights, strict=True):
            leaf.data.copy_(value)

    def step(self, rate: float) -> None:
        """Move all tensors."""
        for leaf, each in zip(self._tensors, self._trained, strict=True):
            leaf.data.sub_(each.direction().mul_(rate))

    def forget(self) -> None:
        """Forget all gradients, as after a return to other weights."""
        for each in self._trained:
            each.forget()
