"""From an architecture to a proven literal: find the attention, try its freedoms, propose a literal, test the laws."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from einops import EinopsError
from torch import nn

from ..core.errors import UserError
from ..core.progress import Progress
from ..families.layout import check_shapes
from ..families.spec import Attention, Family
from .candidate import Candidate
from .find import FoundAttention, find
from .freedom import KeyPosition, check_values, layers_field, position, query_order
from .laws import prove_laws
from .literal import attention_of, defaults_of
from .rotary import rope_of
from .settings import refusals
from .toy import Architecture, ToyModel, Unproven, in_float64, logits


def establish_family(
    architecture: Architecture, findings: list[str], progress: Progress
) -> tuple[Family, Mapping[str, float]]:
    """Return the literal, and the change of the logits under each law; lines about what was found are appended to `findings`.

    Raises:
        Unproven: says in one line why there is no literal.
    """
    found = find(architecture)
    toy_model = ToyModel.of(architecture)
    findings.append(_found(found))
    _check_gains(toy_model, found)
    attention, candidate = _layout(architecture.model_type, found, toy_model)
    findings.append("V: any invertible matrix is free")
    normed = "k_norm" in found.names
    offset = _stored_gains(toy_model, found) if normed else 0.0
    where = position(candidate, normed=normed)
    layers = layers_field(toy_model.config, where.without, len(candidate.sites)) if where.without else None
    findings.append(_position(where, layers, candidate))
    found, attention = _ordered(architecture.model_type, found, toy_model, attention, candidate)
    findings.append(f"order of query heads: {attention.order}" + (", sinks move with them" if attention.sinks else ""))
    norm, input_offset = input_norm(toy_model, found)
    rope = rope_of(architecture, attention, where, candidate.sites[0].head_dim, layers)
    attention = replace(attention, input_norm=norm)
    family = Family(
        model_types=(architecture.model_type,),
        attentions=(attention,),
        position=rope,
        norm_gain_offset=offset if normed else input_offset,
        defaults=defaults_of(architecture, attention, rope),
    )
    laws = prove_laws(architecture, family, progress)
    return replace(family, refuses=refusals(architecture, family)), laws


def _found(found: FoundAttention) -> str:
    roles = ", ".join(f"{role} {name}" for role, name in found.names.items())
    counts = found.fields.get("kv_heads") if found.stock_gqa else "no field"
    return f"{found.num_layers} × {found.at}: {roles}; K/V heads by {counts}"


def _position(where: KeyPosition, layers: str | None, candidate: Candidate) -> str:
    freedom, head_dim = where.freedom, candidate.sites[0].head_dim
    if freedom.kind == "any":
        return "K: any invertible matrix is free, so no position enters it"
    what = "a sign per plane and a scale" if freedom.normed else "a complex number per plane"
    layout = "neighbouring dims" if freedom.interleaved else "halves"
    without = f"; no position in {len(where.without)} of {len(candidate.sites)} layers" if where.without else ""
    said_by = f", according to {layers}" if layers else ", which no field of the config says" if where.without else ""
    return f"K: {what} is free, {layout} of {freedom.rotary_dim} of {head_dim} dims{without}{said_by}"


def _layout(model_type: str, found: FoundAttention, toy_model: ToyModel) -> tuple[Attention, Candidate]:
    """Return the entry of the literal with the names on disk, and with the order of the rows of a fused projection for which V is
    free."""
    refusals = []
    for fused in ("segments", "per-group") if "qkv" in found.names else ("segments",):
        # Rows by head are written for one count of K/V heads alone; a grouped model has q, k and v apart.
        stock_gqa = found.stock_gqa and fused == "segments"
        attention = attention_of(replace(found, stock_gqa=stock_gqa), toy_model, fused)
        try:
            candidate = _candidate(toy_model, model_type, attention)
            if candidate.sites[0].num_kv_heads == 1:
                raise Unproven("it already has one K/V head, so that nothing can be folded")
            check_values(candidate, found.others)
        except Unproven as refusal:
            refusals.append(refusal)
        except EinopsError:
            refusals.append(Unproven(f"the rows of {found.names['qkv']} are in an unknown order"))
        else:
            return attention, candidate
    raise refusals[0]


def _candidate(toy_model: ToyModel, model_type: str, attention: Attention) -> Candidate:
    try:
        candidate = Candidate.of(toy_model, Family(model_types=(model_type,), attentions=(attention,)))
        for site in candidate.sites:
            check_shapes(site, lambda name: tuple(toy_model.tensors[name].shape), "toy model")
    except Unproven:
        raise
    except UserError as refusal:
        raise Unproven(str(refusal)) from refusal
    return candidate


def _ordered(
    model_type: str, found: FoundAttention, toy_model: ToyModel, attention: Attention, candidate: Candidate
) -> tuple[FoundAttention, Attention]:
    """Find out whether query heads may be reordered, if necessary together with a parameter that has one number per head."""
    if query_order(candidate) == "free":
        return found, attention
    module = toy_model.model.get_submodule(found.at.format(layer=0))
    per_head = [name for name in found.others if module.get_parameter(name).shape == (candidate.sites[0].num_heads,)]
    for name in per_head:
        with_sinks = replace(found, names={**found.names, "sinks": name})
        attention_with_sinks = attention_of(with_sinks, toy_model, attention.fused)
        if query_order(_candidate(toy_model, model_type, attention_with_sinks)) == "free":
            return with_sinks, attention_with_sinks
    return found, replace(attention, order="fixed")


def _check_gains(toy_model: ToyModel, found: FoundAttention) -> None:
    """Check that the norms of q and k have one set of gains for all heads."""
    for role in ("q_norm", "k_norm") if "k_norm" in found.names else ():
        if role not in found.names:
            raise Unproven(f"{found.at}: K passes a norm but Q does not; expected both or neither")
        gains = toy_model.model.get_parameter(f"{found.path(role, 0)}.weight")
        if gains.ndim != 1 or gains.numel() >= toy_model.config[found.fields["hidden_size"]]:
            raise Unproven(
                f"its {role} has gains of shape {tuple(gains.shape)}, those of all heads: a norm over all heads, or with separate "
                "gains for each, depends on their number"
            )


def _stored_gains(toy_model: ToyModel, found: FoundAttention) -> float:
    """Return what q_norm and k_norm add to their stored gains.

    Raises:
        Unproven: they are not norms of single heads by their root mean square.
    """
    offsets = set()
    for role in ("q_norm", "k_norm"):
        module = toy_model.model.get_submodule(found.path(role, 0))
        offset = gain_offset(module, centred=False)
        if offset is None:
            raise Unproven(
                f"its {role} is not a root-mean-square norm; one with a mean or a bias mixes the dims of a head"
            )
        offsets.add(offset)
    if len(offsets) != 1:
        raise Unproven("q_norm and k_norm store their gains in different ways")
    return offsets.pop()


def gain_offset(module: nn.Module, *, centred: bool) -> float | None:
    """Return what a norm adds to its stored gains, derived from its output for known numbers.

    None if it is not a norm by the root mean square or, if `centred`, by mean and standard deviation.
    """
    weight = module.get_parameter("weight")
    x = torch.linspace(-1, 2, weight.shape[0], dtype=torch.float64)[None]
    y = x - x.mean() if centred else x
    with in_float64(module), torch.no_grad():
        bias = getattr(module, "bias", None)
        gains = ((module(x) - (0 if bias is None else bias)) / y * y.square().mean().sqrt())[0]
    offset = gains - weight
    whole = offset.mean().round()
    return whole.item() if (offset - whole).abs().max() < 1e-6 else None


def input_norm(toy_model: ToyModel, found: FoundAttention) -> tuple[str, float]:
    """Return the name on disk of the norm whose output K is computed from, and what it adds to its gains; an empty name if there
    is none."""
    outer = found.at.format(layer=0).rpartition(".")[0]
    reads = found.path("k" if "k" in found.names else "qkv", 0)
    layer = toy_model.model.get_submodule(outer)
    norms = {
        f"{outer}.{name}": m
        for name, m in layer.named_children()
        if getattr(getattr(m, "weight", None), "ndim", 0) == 1
    }
    with _recorded_calls(toy_model, [reads, *norms]) as calls:
        logits(toy_model.model)
    for path, module in norms.items():
        if torch.equal(calls[path][1], calls[reads][0]):
            stored = toy_model.on_disk(f"{path}.weight").removesuffix(".weight")
            return stored.rpartition(".")[2], gain_offset(module, centred=False) or gain_offset(
                module, centred=True
            ) or 0.0
    return "", 0.0


@contextmanager
def _recorded_calls(toy_model: ToyModel, paths: list[str]) -> Iterator[dict[str, tuple[torch.Tensor, Any]]]:
    """Record the input and output of modules, by path, in the next forward pass."""
    calls: dict[str, tuple[torch.Tensor, Any]] = {}
    handles = [
        toy_model.model.get_submodule(path).register_forward_hook(
            lambda module, inputs, output, path=path: calls.__setitem__(path, (inputs[0], output))
        )
        for path in paths
    ]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()
