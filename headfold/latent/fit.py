"""The best latent and rotary key of one site in closed form, then by alternation over the distances that attention covers.

Minimises Σ_h w_h E|qᵀ (R S_h − T_h R' B) y|² + Σ_h E‖W_o,h (v_h − U_h A y)‖² over the shared map B (rotary key, then the latent A) and
the read-outs T_h and U_h of every query head: the error of `core.readout`, with the latent as dims of frequency zero and the values as
members that do not turn (docs/mla.md, 2 and 3).
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..core.readout import DistanceAverage, Frame
from ..core.shared import NEGLIGIBLE, used
from .moments import SiteMoments

MAX_ROUNDS = 60
ENOUGH = 1e-3
"""Relative gain below which no further round is made."""
EXACT = 1e-10
"""Error, as a share of the energy, at which the fit stops."""
LARGE, SPARE, STEPS = 2048, 32, 4
"""Rows from which the start is found by subspace iteration, the vectors beside those that are wanted, and the steps."""
_RIDGE = 1e-12


@dataclass(frozen=True, slots=True)
class Fit:
    """The shared map and its read-outs. The shared dims are the rotary ones, pair by pair, then the latent."""

    mix: Float[Tensor, "shared row"]
    keys: Float[Tensor, "head dim shared"]
    values: Float[Tensor, "head value_dim rank"]
    error: float
    """As a share of the energy of keys and values, weighted as the fit weights them."""


def fit(moments: SiteMoments, rank: int, frequencies: Float[Tensor, " rotary_plane"], rounds: int = MAX_ROUNDS) -> Fit:
    """Return the fit of a latent of `rank` dims and a rotary key with these frequencies, in radians per token."""
    return _Alternation(moments, rank, frequencies.double()).run(rounds)


class _Alternation:
    """The two linear solutions, with every pair of dims in the order of `core.readout.Frame`: all first dims, then all second ones."""

    def __init__(self, moments: SiteMoments, rank: int, frequencies: Tensor) -> None:
        self.moments, self.rank, self.num_planes = moments, rank, len(frequencies)
        self.frequencies = frequencies
        dim, odd = moments.dim, rank % 2
        # A latent of an odd number of dims gets one that stays empty.
        pairs = torch.cat([frequencies, frequencies.new_zeros((rank + odd) // 2)])
        self.size = 2 * len(pairs)
        own = Frame(_split(dim), moments.frequencies)
        shared = Frame(_split(self.size), pairs)
        self.at_shared = DistanceAverage(shared, shared, moments.distances)
        self.across = DistanceAverage(shared, own, moments.distances)
        self.back = DistanceAverage(own, shared, moments.distances)
        self.order, self.own_order = shared.order, own.order
        self.latent = slice(2 * self.num_planes, 2 * self.num_planes + rank)
        num_keys = moments.num_kv_heads * dim
        value_dim = moments.outputs.shape[1]
        reads = moments.kv_of_query[:, None]
        self.key_rows = reads * dim + torch.arange(dim)
        self.value_rows = num_keys + reads * value_dim + torch.arange(value_dim)
        own_gram = moments.gram[self.key_rows[:, :, None], self.key_rows[:, None]]
        at_own = DistanceAverage(own, own, moments.distances)
        turned = at_own(self._own(moments.queries)) * self._own(own_gram).mT
        values = moments.gram[self.value_rows[:, :, None], self.value_rows[:, None]]
        self.energy = float(turned.sum() + (moments.outputs * values).sum())

    def _own(self, matrices: Tensor) -> Tensor:
        return matrices[:, self.own_order][:, :, self.own_order]

    def run(self, rounds: int) -> Fit:
        """Return the best of all rounds, each of which solves for the read-outs, then for the shared map."""
        mix = self.first()
        best: tuple[float, Tensor, Tensor, Tensor] | None = None
        for _ in range(rounds):
            seen = mix @ self.moments.gram
            keys, values = self.readouts(mix, seen)
            linear, square = self.weights(keys, values)
            missed = float((square * (seen @ mix.T)).sum() - 2 * (linear * seen).sum())
            error = 1 + missed / max(self.energy, 1e-300)
            gain = 1.0 if best is None else best[0] - error
            if gain > 0:
                best = error, mix, keys, values
            if error < EXACT or gain < ENOUGH * error:
                break
            mix = _solved(square, linear)
        assert best is not None
        error, mix, keys, values = best
        end = self.latent.stop
        return self.orthogonal(Fit(mix[:end], keys[:, :, :end], values, max(error, 0.0)))

    def first(self) -> Float[Tensor, "shared row"]:
        """Return the start: for every rotary plane the best functional of the nearest plane of K, then the best latent of what is left."""
        own, dim = self.moments.frequencies, self.moments.dim
        mix = self.moments.gram.new_zeros(self.size, len(self.moments.gram))
        nearest = (own - self.frequencies[:, None]).abs() / own.clamp_min(torch.finfo(own.dtype).tiny)
        plane_of = nearest.argmin(1).tolist()
        for plane in dict.fromkeys(plane_of):
            places = [place for place, chosen in enumerate(plane_of) if chosen == plane]
            self._start_plane(mix, plane, places)
        is_left = torch.tensor([plane not in plane_of for plane in range(dim // 2)])
        root = self._latent_root(is_left)
        vectors = _leading(root @ self.moments.gram @ root, self.rank)
        mix[self.latent.start : self.latent.start + vectors.shape[1]] = vectors.T @ root
        return mix

    def _start_plane(self, mix: Tensor, plane: int, places: list[int]) -> None:
        """Write the leading functionals of one plane over all K heads to rotary planes, as real rows."""
        moments = self.moments
        energy = torch.diagonal(moments.queries, dim1=1, dim2=2)[:, 2 * plane : 2 * plane + 2].sum(1)
        root = used(energy.new_zeros(moments.num_kv_heads).index_add(0, moments.kv_of_query, energy)).sqrt()
        first = torch.arange(moments.num_kv_heads) * moments.dim + 2 * plane
        second, gram = first + 1, moments.gram
        real = gram[first][:, first] + gram[second][:, second]
        imaginary = gram[second][:, first] - gram[first][:, second]
        vectors = torch.linalg.eigh(torch.complex(real, imaginary) * root[:, None] * root)[1].flip(1)
        for place, vector in zip(places, vectors.T, strict=False):
            u = vector.conj() * root
            mix[2 * place, first], mix[2 * place, second] = u.real, -u.imag
            mix[2 * place + 1, first], mix[2 * place + 1, second] = u.imag, u.real

    def _latent_root(self, is_left: Bool[Tensor, " plane"]) -> Float[Tensor, "row row"]:
        """Return the root of what errors of the rows cost: of planes that no rotary plane has, at the mean of their turn, and of V."""
        moments = self.moments
        root = torch.zeros_like(moments.gram)
        mean = moments.distances.average(moments.frequencies).abs() * is_left
        counted = mean.repeat_interleave(2, 1)
        costs = counted[:, :, None] * moments.queries * counted[:, None]
        for rows, matrices in ((self.key_rows, costs), (self.value_rows, moments.outputs)):
            for kv_head in range(moments.num_kv_heads):
                readers = moments.kv_of_query == kv_head
                at = rows[readers][0]
                root[at[:, None], at] = _root(matrices[readers].sum(0))
        return root

    def readouts(self, mix: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
        """Return the best read-outs of keys and values for a shared map M; `seen` is M G."""
        seen = seen.T
        product = mix @ seen
        turned = self.at_shared.adjoint(product[self.order][:, self.order][None])
        own = seen[self.key_rows][:, self.own_order][:, :, self.order]
        keys = _solved(turned, self.back.adjoint(own).mT).mT
        keys = _unsplit(_unsplit(keys, self.order, 2), self.own_order, 1)
        latent = self.latent
        values = _solved(product[latent, latent], seen[self.value_rows][:, :, latent].mT).mT
        return keys, values

    def weights(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Return the linear and the square weight of the error in the shared map: Σ Φ(Tᵀ C) and Σ Φ(Tᵀ C T)."""
        moments = self.moments
        split = keys[:, self.own_order][:, :, self.order]
        read = split.mT @ self._own(moments.queries)
        linear = moments.gram.new_zeros(self.size, len(moments.gram))
        across = _unsplit(_unsplit(self.across(read), self.order, 1), self.own_order, 2)
        square = _unsplit(_unsplit(self.at_shared(read @ split).sum(0), self.order, 0), self.order, 1)
        read_values = values.mT @ moments.outputs
        latent = self.latent
        square[latent, latent] += (read_values @ values).sum(0)
        for head in range(len(keys)):
            linear[:, self.key_rows[head]] += across[head]
            linear[latent, self.value_rows[head]] += read_values[head]
        return linear, square

    def orthogonal(self, found: Fit) -> Fit:
        """Return the same fit with uncorrelated latent dims of mean energy one, and rotary planes of energy one.

        The scale of a dim is split evenly between the latent and its read-outs, so that dims that are nearly empty are not amplified.
        """
        latent = found.mix[self.latent]
        values, vectors = torch.linalg.eigh(latent @ self.moments.gram @ latent.T)
        values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
        is_used = values > NEGLIGIBLE * values[0]
        scale = torch.where(is_used, values, 1.0).pow(0.25)
        scale = scale * (values.sqrt() * is_used).mean().clamp_min(torch.finfo(values.dtype).tiny).sqrt()
        turn = torch.where(is_used, vectors / scale, 0.0).T
        back = torch.where(is_used, vectors * scale, 0.0)
        mix, keys = found.mix.clone(), found.keys.clone()
        mix[self.latent], keys[:, :, self.latent] = turn @ latent, keys[:, :, self.latent] @ back
        rotary = mix[: self.latent.start]
        energy = used(torch.einsum("ar,rs,as->a", rotary, self.moments.gram, rotary).view(-1, 2).mean(1))
        size = energy.sqrt().repeat_interleave(2)
        mix[: self.latent.start] /= size[:, None]
        keys[:, :, : self.latent.start] *= size
        return Fit(mix, keys, found.values @ back, found.error)


def _split(size: int) -> Tensor:
    """Return the dims (0, 2, 4 …, 1, 3, 5 …)."""
    return torch.arange(size).view(-1, 2).T.flatten()


def _unsplit(tensor: Tensor, order: Tensor, dim: int) -> Tensor:
    return tensor.index_select(dim, torch.argsort(order))


def _leading(matrix: Float[Tensor, "n n"], count: int) -> Float[Tensor, "n kept"]:
    """Return the leading eigenvectors of a positive matrix; of a large one by subspace iteration, which is enough to start from."""
    if len(matrix) < LARGE or 2 * count > len(matrix):
        return torch.linalg.eigh(matrix)[1].flip(1)[:, :count]
    generator = torch.Generator().manual_seed(0)
    basis = torch.randn(len(matrix), count + SPARE, dtype=matrix.dtype, generator=generator)
    for _ in range(STEPS):
        basis = torch.linalg.qr(matrix @ basis)[0]
    return basis @ torch.linalg.eigh(basis.T @ matrix @ basis)[1].flip(1)[:, :count]


def _root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.T


def _solved(matrix: Float[Tensor, "*#batch n n"], right: Float[Tensor, "*#batch n k"]) -> Tensor:
    """Solve a symmetric positive system that may be singular in unused dims."""
    diagonal = torch.diagonal(matrix, dim1=-2, dim2=-1)
    ridge = _RIDGE * diagonal.amax(-1, keepdim=True).clamp_min(torch.finfo(matrix.dtype).tiny)
    ridge = ridge + torch.where(diagonal > ridge, 0.0, diagonal.amax(-1, keepdim=True).clamp_min(1e-300))
    return torch.linalg.solve(matrix + torch.diag_embed(ridge.expand_as(diagonal)), right)
