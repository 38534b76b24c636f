"""From an architecture to a proven literal: find, try, propose, test."""

from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from einops import EinopsError
from torch import nn

from ..core.errors import UserError
from ..families.layout import check_shapes
from ..families.spec import Attention, Family
from .candidate import Specimen, Trial
from .find import Found, find
from .freedom import Position, check_values, layers_field, position, query_order
from .laws import prove_laws
from .literal import attention_of, defaults_of
from .rotary import rope_of
from .settings import refusals
from .toy import Subject, Unproven, in_float64, logits


def established(subject: Subject, seen: list[str]) -> tuple[Family, Mapping[str, float]]:
    """The literal and how far the logits moved under each law; `seen` is told what was found on the way.

    Raises:
        Unproven: one line, why there is none.
    """
    found = find(subject)
    specimen = Specimen.of(subject)
    seen.append(_found(found))
    _check_gains(specimen, found)
    attention, trial = _layout(subject.model_type, found, specimen)
    seen.append("V: any invertible matrix is free")
    normed = "k_norm" in found.names
    offset = _stored_gains(specimen, found) if normed else 0.0
    where = position(trial, normed=normed)
    layers = layers_field(specimen.config, where.without, len(trial.sites)) if where.without else None
    seen.append(_position(where, layers, trial))
    found, attention = _ordered(subject.model_type, found, specimen, attention, trial)
    seen.append(f"order of query heads: {attention.order}" + (", sinks move with them" if attention.sinks else ""))
    norm, input_offset = input_norm(specimen, found)
    rope = rope_of(subject, attention, where, trial.sites[0].head_dim, layers)
    attention = replace(attention, input_norm=norm)
    family = Family(
        model_types=(subject.model_type,),
        attentions=(attention,),
        position=rope,
        norm_gain_offset=offset if normed else input_offset,
        defaults=defaults_of(subject, attention, rope),
    )
    laws = prove_laws(subject, family)
    return replace(family, refuses=refusals(subject, family)), laws


def _found(found: Found) -> str:
    roles = ", ".join(f"{role} {name}" for role, name in found.names.items())
    counts = found.fields.get("kv_heads") if found.stock_gqa else "no field"
    return f"{found.num_layers} × {found.at}: {roles}; K/V heads by {counts}"


def _position(where: Position, layers: str | None, trial: Trial) -> str:
    freedom, head_dim = where.freedom, trial.sites[0].head_dim
    if freedom.kind == "any":
        return "K: any invertible matrix is free, so no position enters it"
    what = "a sign per plane and a scale" if freedom.normed else "a complex number per plane"
    layout = "neighbouring dims" if freedom.interleaved else "halves"
    without = f"; no position in {len(where.without)} of {len(trial.sites)} layers" if where.without else ""
    told = f", by {layers}" if layers else ", not told by the config" if where.without else ""
    return f"K: {what} is free, {layout} of {freedom.rotary_dim} of {head_dim} dims{without}{told}"


def _layout(model_type: str, found: Found, specimen: Specimen) -> tuple[Attention, Trial]:
    """The names on disk, and how rows of a fused projection lie: whichever way V is free."""
    refusals = []
    for fused in ("segments", "per-group") if "qkv" in found.names else ("segments",):
        # Rows by head are written for one count of K/V heads alone; a grouped model has q, k and v apart.
        native = found.stock_gqa and fused == "segments"
        attention = attention_of(replace(found, stock_gqa=native), specimen, fused)
        try:
            trial = _under(specimen, model_type, attention)
            if trial.sites[0].num_kv_heads == 1:
                raise Unproven("it has one K/V head already: nothing is left to fold")
            check_values(trial, found.others)
        except Unproven as refusal:
            refusals.append(refusal)
        except EinopsError:
            refusals.append(Unproven(f"the rows of {found.names['qkv']} lie in no order known"))
        else:
            return attention, trial
    raise refusals[0]


def _under(specimen: Specimen, model_type: str, attention: Attention) -> Trial:
    try:
        trial = specimen.under(Family(model_types=(model_type,), attentions=(attention,)))
        for site in trial.sites:
            check_shapes(site, lambda name: tuple(specimen.tensors[name].shape), "toy model")
    except Unproven:
        raise
    except UserError as refusal:
        raise Unproven(str(refusal)) from refusal
    return trial


def _ordered(
    model_type: str, found: Found, specimen: Specimen, attention: Attention, trial: Trial
) -> tuple[Found, Attention]:
    """Whether query heads may move, if need be with a parameter that has one number for each."""
    if query_order(trial) == "free":
        return found, attention
    module = specimen.model.get_submodule(found.at.format(layer=0))
    per_head = [name for name in found.others if module.get_parameter(name).shape == (trial.sites[0].num_heads,)]
    for name in per_head:
        told = replace(found, names={**found.names, "sinks": name})
        sinking = attention_of(told, specimen, attention.fused)
        if query_order(_under(specimen, model_type, sinking)) == "free":
            return told, sinking
    return found, replace(attention, order="fixed")


def _check_gains(specimen: Specimen, found: Found) -> None:
    """Norms of q and k must have one set of gains for all heads."""
    for role in ("q_norm", "k_norm") if "k_norm" in found.names else ():
        if role not in found.names:
            raise Unproven(f"{found.at}: K passes a norm and Q none; expected both or neither")
        gains = specimen.model.get_submodule(found.path(role, 0)).weight
        if gains.ndim != 1 or gains.numel() >= specimen.config[found.fields["width"]]:
            raise Unproven(
                f"its {role} has gains of shape {tuple(gains.shape)}, those of all heads: "
                "over all heads at once, or of its own for each, it changes with their number"
            )


def _stored_gains(specimen: Specimen, found: Found) -> float:
    """What q_norm and k_norm add to their stored gains.

    Raises:
        Unproven: norms that are not of single heads by their root mean square.
    """
    offsets = set()
    for role in ("q_norm", "k_norm"):
        module = specimen.model.get_submodule(found.path(role, 0))
        offset = gain_offset(module, centred=False)
        if offset is None:
            raise Unproven(
                f"its {role} is no root-mean-square norm; one with a mean or a bias mixes the dims of a head"
            )
        offsets.add(offset)
    if len(offsets) != 1:
        raise Unproven("q_norm and k_norm store their gains in different ways")
    return offsets.pop()


def gain_offset(module: nn.Module, *, centred: bool) -> float | None:
    """What a norm adds to its stored gains, by what it makes of some numbers.

    None where it is no norm by the root mean square or, `centred`, by mean and standard deviation.
    """
    x = torch.linspace(-1, 2, module.weight.shape[0], dtype=torch.float64)[None]
    y = x - x.mean() if centred else x
    with in_float64(module), torch.no_grad():
        bias = getattr(module, "bias", None)
        gains = ((module(x) - (0 if bias is None else bias)) / y * y.square().mean().sqrt())[0]
    offset = gains - module.weight
    whole = offset.mean().round()
    return whole.item() if (offset - whole).abs().max() < 1e-6 else None


def input_norm(specimen: Specimen, found: Found) -> tuple[str, float]:
    """The norm on disk beside the attention whose output K is made of, and what it adds to its gains; empty where none is."""
    outer = found.at.format(layer=0).rpartition(".")[0]
    reads = found.path("k" if "k" in found.names else "qkv", 0)
    layer = specimen.model.get_submodule(outer)
    norms = {
        f"{outer}.{name}": m
        for name, m in layer.named_children()
        if getattr(getattr(m, "weight", None), "ndim", 0) == 1
    }
    with _listening(specimen, [reads, *norms]) as heard:
        logits(specimen.model)
    for path, module in norms.items():
        if torch.equal(heard[path][1], heard[reads][0]):
            stored = specimen.on_disk(f"{path}.weight").removesuffix(".weight")
            return stored.rpartition(".")[2], gain_offset(module, centred=False) or gain_offset(
                module, centred=True
            ) or 0.0
    return "", 0.0


@contextmanager
def _listening(specimen: Specimen, paths: list[str]) -> Any:
    """Path → the input and output of its module in the next forward pass."""
    heard: dict[str, tuple[torch.Tensor, Any]] = {}
    handles = [
        specimen.model.get_submodule(path).register_forward_hook(
            lambda module, inputs, output, path=path: heard.__setitem__(path, (inputs[0], output))
        )
        for path in paths
    ]
    try:
        yield heard
    finally:
        for handle in handles:
            handle.remove()
