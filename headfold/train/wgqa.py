"""WGQA: the K and V of a grouped model as weighted sums of the original's heads, with the weights trained, then folded away.

Source: 2407.10855 (there for the decoder of T5; here for any attention whose K and V are linears of their own). For a group g of heads

    kind=scalar (WGQA)      K_g = Σ w_i W_i             w_i a number
    kind=column (COLWGQA)   K_g = Σ diag(c_i) W_i       c_i over a head's dims
    kind=row    (ROWWGQA)   K_g = Σ W_i diag(r_i)       r_i over the model's dims

with the W_i as `nn.Linear` has them (output, input), and V likewise with coefficients of its own. The paper does not say which side `row`
and `column` are; its counts of parameters do (576, 36,864 and 442,368 on T5-base). Biases, which T5 has none of, are taken along as
columns of [W | b], so r_i has one entry more where there is a bias. `init=mean` starts at one over the size of the group, that is at
the mean fold; `init=random` at N(0, 1), the paper's RAND variants.

With the W_i trained too, as the paper does, a group's sum can be any matrix whatever the coefficients are: no function is reached
that fine-tuning the grouped weights could not reach. It is another parametrization, in which a step of given size goes elsewhere.
`frozen=true` trains the coefficients and nothing else: few numbers, which say how much each head of a group counts. That is the
version with content.

While attached, every forward pass makes K's and V's weights anew from as many heads as the original has, so it holds those in memory and
takes longer; `torch.nn.utils.parametrize.cached()` around inference makes them once. Nothing is kept between passes, which is why
gradient checkpointing and DistributedDataParallel work; in torch.nn.DataParallel, biases do not.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import PreTrainedModel

from ..core import plugins
from ..core.combining import combine, equal_weights
from ..core.errors import UserError
from ..core.groups import Groups
from ..core.plan import Plan
from ..families.layout import read_heads
from ..families.spec import Site
from ..merge import parse_merge
from ..runtime.regrouping import local_names
from ..surgery import site_tensors

Read = Callable[[str], Tensor]
CHOICES = {"kind": ("scalar", "row", "column"), "init": ("mean", "random")}


@dataclass(frozen=True, slots=True)
class Options:
    """What `wgqa:kind=row,init=random,frozen=true` says."""

    kind: Literal["scalar", "row", "column"]
    init: Literal["mean", "random"]
    frozen: bool


def wgqa(*, kind: str = "scalar", init: str = "mean", frozen: bool = False) -> Options:
    """The options checked.

    Raises:
        UserError: a kind or init that there is not.
    """
    for name, value in (("kind", kind), ("init", init)):
        if value not in CHOICES[name]:
            raise UserError(f"wgqa: {name}={value!r}, expected {' or '.join(CHOICES[name])}")
    return Options(kind, init, frozen)


def parse(spec: str) -> Options:
    """`wgqa` or `wgqa:key=value,…` → its options.

    Raises:
        UserError: another name, or an option or value that there is not.
    """
    name, _, options = spec.partition(":")
    if name != "wgqa":
        raise UserError(f"unknown parametrization {name!r}; expected wgqa, such as wgqa:kind=column,frozen=true")
    return wgqa(**plugins.parse_options(name, options, wgqa))


class WeightedHeads(nn.Module):
    """The parametrization of a weight: the original's rows → the grouped ones. It owns the coefficients of weight and bias."""

    def __init__(self, coefficients: Float[Tensor, "head #dim #columns"], groups: Groups, site: str, role: str) -> None:
        super().__init__()
        self.coefficients = nn.Parameter(coefficients)
        self.groups, self.site, self.role = groups, site, role

    def forward(self, weight: Float[Tensor, "head_times_dim model"]) -> Float[Tensor, "group_times_dim model"]:
        rows = weight.unflatten(0, (self.groups.num_heads, -1))
        return combine(rows, self.coefficients[..., : weight.shape[1]], self.groups).flatten(0, 1)


class WeightedBiases(nn.Module):
    """The parametrization of a bias, by the coefficients of its weight, the last of them where columns have their own."""

    def __init__(self, of: WeightedHeads) -> None:
        super().__init__()
        self._of = (of,)  # no submodule: the coefficients would stand in the state twice

    def forward(self, bias: Float[Tensor, " head_times_dim"]) -> Float[Tensor, " group_times_dim"]:
        (of,) = self._of
        rows = bias.unflatten(0, (of.groups.num_heads, -1))[..., None]
        return combine(rows, of.coefficients[..., -1:], of.groups).flatten()


class _Linear(NamedTuple):
    """One projection of a grouped model, and what it was made from."""

    site: str
    role: str
    module: nn.Linear
    heads: Float[Tensor, "head dim model_plus_1"]
    groups: Groups


def attach(
    model: PreTrainedModel, sites: Iterable[Site], plan: Plan, read: Read, spec: str = "wgqa", *, seed: int = 0
) -> Options:
    """Let K and V of every folded site be weighted sums of the original's heads, in place; returns what `spec` says.

    `model` is the fold by `plan` as `headfold.load` opens it, `sites` are the original's, `read` gives the original's tensors by their
    names on disk. Coefficients and sums are in the model's dtype, float32 at least. `seed` is that of `init=random`.

    The trained tensors are ordinary parameters, `<linear>.parametrizations.weight.original` (and `.bias.original`) the original's heads and
    `<linear>.parametrizations.weight.0.coefficients`, so that optimizers and `state_dict` see them: to go on in the middle of
    training, attach to the fold again as before, and load the state. What is saved while attached has these names, so it is a state
    and no model.

    Raises:
        UserError: an unknown option; a model that is not the fold by that plan, with the original's queries; a site whose q, k and v are
            one linear, or whose heads are wide; a model with WGQA attached.
    """
    options = parse(spec)
    if attached(model):
        raise UserError("wgqa: expected a model without it, this one has it attached; fold it away first")
    found = [linear for site in _folded(sites, plan) for linear in _linears(model, site, plan, read)]
    model.headfold_trained = frozenset(name for name, parameter in model.named_parameters() if parameter.requires_grad)
    if options.frozen:
        model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for linear in found:
        _parametrize(linear, _initial(linear, options, generator))
    return options


def attached(model: nn.Module) -> list[WeightedHeads]:
    """Those at work in a model, in its order."""
    return [module for module in model.modules() if isinstance(module, WeightedHeads)]


def coefficients(model: nn.Module) -> dict[str, dict[str, Tensor]]:
    """By site, those of its `k` and `v`: (head,), (head, dim) or (head, model), the last with one column more for a bias."""
    found: dict[str, dict[str, Tensor]] = {}
    for heads in attached(model):
        values = heads.coefficients.detach().clone().flatten(1)
        found.setdefault(heads.site, {})[heads.role] = values[:, 0] if heads.coefficients[0].numel() == 1 else values
    return found


def trainable(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """The parameters to be trained, `coefficients` and `weights` apart: the former are best without weight decay, which pulls to 0."""
    own = {id(heads.coefficients) for heads in attached(model)}
    found: dict[str, list[nn.Parameter]] = {"coefficients": [], "weights": []}
    for parameter in model.parameters():
        if parameter.requires_grad:
            found["coefficients" if id(parameter) in own else "weights"].append(parameter)
    return found


def fold_away(model: PreTrainedModel) -> None:
    """Leave the grouped weights that the sums amount to, as ordinary parameters, in place; the model says what it said, bit for bit.

    Names, shapes and what is trained are those from before `attach`. An optimizer made before that is of no use any more.

    Raises:
        UserError: nothing is attached.
    """
    if not attached(model):
        raise UserError("wgqa: expected a model with it attached, found none; attach it first")
    for module in list(model.modules()):
        for name in _weighted(module):
            parametrize.remove_parametrizations(module, name, leave_parametrized=True)
            getattr(module, name).grad = None
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in model.headfold_trained)
    del model.headfold_trained


def _weighted(module: nn.Module) -> list[str]:
    """Names of the module's tensors that are weighted sums."""
    lists = module.parametrizations.items() if parametrize.is_parametrized(module) else ()
    return [name for name, (first, *_) in lists if isinstance(first, WeightedHeads | WeightedBiases)]


def _folded(sites: Iterable[Site], plan: Plan) -> list[Site]:
    """Sites that the plan gives fewer K/V heads."""
    planned = [site for site in sites if site.name in plan.sites]
    found = [site for site in planned if plan.sites[site.name].groups.num_kv_heads < site.num_kv_heads]
    if not found:
        raise UserError(
            "wgqa: expected a plan that gives some of these sites fewer K/V heads, found none; is it theirs?"
        )
    return found


def _linears(model: PreTrainedModel, site: Site, plan: Plan, read: Read) -> Sequence[_Linear]:
    """K's and V's of a site, checked to be what the plan made of the original."""
    _refuse(site, plan)
    heads, groups = read_heads(site, read), plan.sites[site.name].groups
    _check_rest(model, site, plan, read)
    return [
        _Linear(site.name, role, model.get_submodule(_path(site, role)), getattr(heads, role), groups) for role in "kv"
    ]


def _refuse(site: Site, plan: Plan) -> None:
    """What a weighted sum of the original's heads makes no sense for."""
    planned = plan.sites[site.name]
    if "qkv" in site.weights and site.stock_gqa:
        raise UserError(
            f"wgqa: {site.name}: expected linears of their own for k and v, its class has one for q, k and v"
        )
    if planned.head_dim != site.head_dim:
        raise UserError(
            f"wgqa: {site.name}: expected heads of the original's width {site.head_dim}, the plan has {planned.head_dim}: a wide head "
            "keeps several heads beside each other, there is nothing to weigh; make the plan with --head-dim-multiple 1"
        )
    if parse_merge(planned.merge).record.transforms_queries:
        raise UserError(
            f"wgqa: {site.name}: expected a merge that leaves queries alone, the plan has {planned.merge}, which turns them, so the "
            "original's keys do not fit them; fold with --merge mean --no-refit"
        )


def _path(site: Site, role: str) -> str:
    """Of a projection in the grouped model."""
    return site.paths.get(role, f"{site.core}.{role}_proj")


def _check_rest(model: PreTrainedModel, site: Site, plan: Plan, read: Read) -> None:
    """That all of the site but K and V is in the model as the plan leaves it: its queries are the original's, in the plan's order."""
    present, names = dict(model.named_parameters()), local_names(site)
    merged = {f"{_path(site, role)}.{suffix}" for role in "kv" for suffix in ("weight", "bias")}
    for on_disk, tensor in site_tensors(site, plan, read).items():
        name = f"{site.module}.{names[on_disk]}"
        found = present.get(name)
        same = found is not None and found.shape == tensor.shape
        if same and not (name in merged or found.is_meta):  # a model without numbers is there to be counted
            same = torch.equal(found, tensor.to(found))
        if not same:
            what = "no such parameter" if found is None else "another"
            raise UserError(
                f"wgqa: {site.name}: expected {name} as the plan makes it of the original, found {what}; "
                "fold with --merge mean --no-refit --layout headfold, and attach before training"
            )


def _parametrize(linear: _Linear, weights: Float[Tensor, "head #dim #columns"]) -> None:
    """The linear with the original's heads as its tensors, each behind its parametrization."""
    module = linear.module
    rows = linear.heads.to(module.weight).flatten(0, 1)
    sums = WeightedHeads(weights, linear.groups, linear.site, linear.role)
    _replace(module, "weight", rows[:, :-1], sums)
    if module.bias is not None:
        _replace(module, "bias", rows[:, -1], WeightedBiases(sums))


def _replace(module: nn.Linear, name: str, base: Tensor, parametrization: nn.Module) -> None:
    trained = getattr(module, name).requires_grad
    setattr(module, name, nn.Parameter(base.contiguous(), requires_grad=trained))
    parametrize.register_parametrization(module, name, parametrization, unsafe=True)  # the shape changes


def _initial(linear: _Linear, options: Options, generator: torch.Generator) -> Float[Tensor, "head #dim #columns"]:
    """Coefficients to start from. Drawn in float32, so that a seed means the same in every dtype."""
    num_heads, dim, columns = linear.heads.shape
    columns -= linear.module.bias is None
    shape = {"scalar": (1, 1), "column": (dim, 1), "row": (1, columns)}[options.kind]
    weight = linear.module.weight
    like = {"device": weight.device, "dtype": torch.promote_types(weight.dtype, torch.float32)}
    if options.init == "random":
        return torch.randn(num_heads, *shape, generator=generator).to(**like)
    return equal_weights(linear.groups).expand(-1, *shape).to(**like).clone()
