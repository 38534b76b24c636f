"""Published conversions to multi-head latent attention, from the formulas of their papers, as baselines for `benchmarks/mla.py`.

Each function returns the latent of one site as `headfold.latent` reads it, or, where keys of every head keep planes of their own, what
stands for it. No code of the papers is used. What a paper leaves open is said in the docstring.
"""

import torch
from torch import Tensor

from headfold.core.heads import Heads
from headfold.core.stats import SiteStats
from headfold.latent.site import Latent


def parts(heads: Heads) -> tuple[Tensor, Tensor, Tensor]:
    """Return q, k (planes as pairs (2f, 2f + 1)) and v of a site without biases, in float64."""
    planes = heads.key_freedom.planes().flatten()
    q, k, v = (rows.double()[..., :-1] for rows in (heads.q, heads.k, heads.v))
    return q[:, planes], k[:, planes], v


def transmla(heads: Heads, stats: SiteStats, rank: int, rotary_dim: int, *, balanced: bool = True) -> Latent:
    """Return TransMLA's conversion (2502.07864): real principal components across heads, per plane, the first with position.

    For every frequency, one orthogonal matrix turns the heads' real parts and their imaginary parts alike (RoRoPE), chosen by the second
    moments of the keys; the leading component is the rotary key. With fewer rotary dims than a head has, neighbouring frequencies
    are taken for the first of them and share one component (FreqFold). All other components lose their position, are scaled to the
    values' size (`balanced`), and share principal components of the joint activations with V.
    """
    q, k, v = parts(heads)
    second = stats.mean("second")[:-1, :-1]
    num_kv_heads, dim, model = k.shape
    reads = torch.tensor(heads.groups.group_of_head)
    folds = dim // rotary_dim
    re, im = k[:, 0::2], k[:, 1::2]
    rotary, kept, turns = [], [], []
    for first in range(0, dim // 2, folds):
        a, b = (part[:, first : first + folds].flatten(0, 1) for part in (re, im))
        vectors = torch.linalg.eigh(a @ second @ a.T + b @ second @ b.T)[1].flip(1)
        rotary += [vectors[:, 0] @ a, vectors[:, 0] @ b]
        kept += [vectors[:, 1:].T @ a, vectors[:, 1:].T @ b]
        turns.append(vectors)
    rows = torch.cat(kept)
    values = v.flatten(0, 1)
    energies = [torch.einsum("am,mn,an->", each, second, each) / len(each) for each in (rows, values)]
    scale = float((energies[1] / energies[0]).sqrt()) if balanced else 1.0
    joint = torch.cat([rows * scale, values])
    vectors = torch.linalg.eigh(joint @ second @ joint.T)[1].flip(1)[:, :rank]
    down = vectors.T @ joint
    num_keys = len(rows)
    # Queries in the same basis: head h has weight vectors[g · folds + p] on component c of each pair of parts.
    q_rotary, up_k = [], []
    nope_queries = []
    at = 0
    for number, first in enumerate(range(0, dim // 2, folds)):
        own = turns[number].view(num_kv_heads, folds, -1)[reads]
        parts_of_q = [part[:, first : first + folds] for part in (q[:, 0::2], q[:, 1::2])]
        for part in parts_of_q:
            q_rotary.append(torch.einsum("hp,hpm->hm", own[..., 0], part))
        for part in parts_of_q:
            nope_queries.append(torch.einsum("hpc,hpm->hcm", own[..., 1:], part))
            size = own.shape[2] - 1
            up_k.append(vectors[at : at + size] / scale)
            at += size
    nope = torch.cat(nope_queries, 1)
    up = torch.cat(up_k)
    queries = torch.cat([nope, torch.stack(q_rotary, 1)], 1) * ((nope.shape[1] + rotary_dim) / dim) ** 0.5
    up_v = vectors[num_keys:].unflatten(0, (num_kv_heads, -1))[reads]
    return Latent(queries, down, torch.stack(rotary), up.expand(len(q), -1, -1), up_v, heads.o.double())


def weight_svd(heads: Heads, stats: SiteStats, rank: int, planes_per_head: int, *, whitened: bool) -> Latent:
    """Return the joint truncated SVD of [W_k; W_v] beside rotary planes that every K head keeps for itself.

    Unwhitened this is MHA2MLA's initialisation (2502.14837): a head keeps the planes with the largest ‖q‖ ‖k‖, all others lose their
    position, and the weights of the rest are decomposed jointly with V. Whitened, √C W is decomposed instead (the
    activation-preserving factorisation of CARE, 2603.17946), with the same planes, as how that paper treats position is not in its
    abstract. The rotary key holds the planes of all heads, in the order of the heads; `plane_turns` gives their frequencies.
    """
    q, k, v = parts(heads)
    second = stats.mean("second")[:-1, :-1]
    reads = torch.tensor(heads.groups.group_of_head)
    num_kv_heads, dim, model = k.shape
    chosen = kept_planes(heads, stats, planes_per_head)
    rotary = torch.cat([k[g, _dims(chosen[g])] for g in range(num_kv_heads)])
    is_kept = torch.zeros(num_kv_heads, dim, dtype=torch.bool)
    for g in range(num_kv_heads):
        is_kept[g, _dims(chosen[g])] = True
    rest = torch.where(is_kept[..., None], 0.0, k)
    joint = torch.cat([rest.flatten(0, 1), v.flatten(0, 1)])
    values, basis = torch.linalg.eigh(second)
    root = (basis * values.clamp_min(0).sqrt()) @ basis.T if whitened else torch.eye(model, dtype=torch.float64)
    left = torch.linalg.svd(joint @ root, full_matrices=False)[0][:, :rank]
    up = left.unflatten(0, (2 * num_kv_heads, -1))
    turned = q.new_zeros(len(q), len(rotary), model)
    for h, g in enumerate(reads.tolist()):
        size = 2 * planes_per_head
        turned[h, g * size : (g + 1) * size] = q[h, _dims(chosen[g])]
    scale = ((dim + len(rotary)) / dim) ** 0.5
    queries = torch.cat([q, turned], 1) * scale
    return Latent(queries, left.T @ joint, rotary, up[:num_kv_heads][reads], up[num_kv_heads:][reads], heads.o.double())


def kept_planes(heads: Heads, stats: SiteStats, planes_per_head: int) -> list[Tensor]:
    """Return by K head the planes with the largest product of root mean squares of queries and keys, fastest first."""
    q, k, _ = parts(heads)
    second = stats.mean("second")[:-1, :-1]
    reads = torch.tensor(heads.groups.group_of_head)
    energy_q, energy_k = (torch.einsum("hdm,mn,hdn->hd", x, second, x).unflatten(1, (-1, 2)).sum(2) for x in (q, k))
    by_head = torch.zeros_like(energy_k).index_add(0, reads, energy_q)
    return [row.topk(planes_per_head).indices.sort().values for row in (by_head * energy_k).sqrt()]


def plane_turns(heads: Heads, stats: SiteStats, planes_per_head: int) -> Tensor:
    """Return radians per token of the rotary planes of `weight_svd`."""
    own = torch.tensor(heads.key_freedom.frequencies, dtype=torch.float64)
    return torch.cat([own[planes] for planes in kept_planes(heads, stats, planes_per_head)])


def _dims(planes: Tensor) -> Tensor:
    return torch.stack([2 * planes, 2 * planes + 1], 1).flatten()
