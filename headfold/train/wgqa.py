"""WGQA: the K and V of a grouped model as weighted sums of the original's heads, with trained weights that are folded away at the end.

Source: 2407.10855 (there for the decoder of T5; here for any attention whose K and V are linears of their own). For a group g of heads

    kind=scalar (WGQA)      K_g = Σ w_i W_i             w_i a number
    kind=column (COLWGQA)   K_g = Σ diag(c_i) W_i       c_i over a head's dims
    kind=row    (ROWWGQA)   K_g = Σ W_i diag(r_i)       r_i over the model's dims

with the W_i as `nn.Linear` stores them (output, input), and likewise V with coefficients of its own. The paper does not say which side
`row` and `column` are; its counts of parameters do (576, 36,864 and 442,368 on T5-base). Biases, which T5 does not have, are treated as
columns of [W | b], so r_i has one more entry where there is a bias. `init=mean` starts at one over the size of the group, which is the
mean fold; `init=random` starts at N(0, 1), the paper's RAND variants.

If the W_i are trained too, as in the paper, the sum of a group can be any matrix whatever the coefficients are: every function it
reaches can also be reached by fine-tuning the grouped weights. It is another parametrization, in which a step of given size leads
elsewhere. `frozen=true` trains the coefficients only: few numbers, which tell how much each head of a group contributes.

While attached, every forward pass computes the weights of K and V from as many heads as the original has, so it needs their memory and
more time; `torch.nn.utils.parametrize.cached()` around inference computes them once. Nothing is kept between passes, which is why
gradient checkpointing and DistributedDataParallel work; in torch.nn.DataParallel, biases do not.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, cast, get_args

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
from ..runtime.regrouping import model_names
from ..surgery import site_tensors

Read = Callable[[str], Tensor]
_TRAINED = "headfold_trained"
"""Attribute of a model with WGQA attached: the names of the parameters that were trained before."""
Kind = Literal["scalar", "row", "column"]
Init = Literal["mean", "random"]


@dataclass(frozen=True, slots=True)
class Options:
    """The options of `wgqa:kind=row,init=random,frozen=true`."""

    kind: Kind
    init: Init
    frozen: bool


def wgqa(*, kind: str = "scalar", init: str = "mean", frozen: bool = False) -> Options:
    """Return the options, checked.

    Raises:
        UserError: an unknown kind or init.
    """
    for name, value, choices in (("kind", kind, get_args(Kind)), ("init", init, get_args(Init))):
        if value not in choices:
            raise UserError(f"wgqa: {name}={value!r}, expected {' or '.join(choices)}")
    return Options(cast(Kind, kind), cast(Init, init), frozen)


def parse(spec: str) -> Options:
    """Return the options of `wgqa` or `wgqa:key=value,…`.

    Raises:
        UserError: another name, or an unknown option or value.
    """
    name, _, options = spec.partition(":")
    if name != "wgqa":
        raise UserError(f"unknown parametrization {name!r}; expected wgqa, such as wgqa:kind=column,frozen=true")
    return wgqa(**plugins.parse_options(name, options, wgqa))


class WeightedHeads(nn.Module):
    """The parametrization of a weight: maps the original's rows to the grouped rows. It owns the coefficients of weight and bias."""

    def __init__(self, coefficients: Float[Tensor, "head #dim #columns"], groups: Groups, site: str, role: str) -> None:
        super().__init__()
        self.coefficients = nn.Parameter(coefficients)
        self.groups, self.site, self.role = groups, site, role

    def forward(self, weight: Float[Tensor, "head_times_dim model"]) -> Float[Tensor, "group_times_dim model"]:
        rows = weight.unflatten(0, (self.groups.num_heads, -1))
        return combine(rows, self.coefficients[..., : weight.shape[1]], self.groups).flatten(0, 1)


class WeightedBiases(nn.Module):
    """The parametrization of a bias, with the coefficients of its weight, the last of them where columns have coefficients of their
    own.
    """

    def __init__(self, of: WeightedHeads) -> None:
        super().__init__()
        self._of = (of,)  # no submodule: the coefficients would stand in the state twice

    def forward(self, bias: Float[Tensor, " head_times_dim"]) -> Float[Tensor, " group_times_dim"]:
        (of,) = self._of
        rows = bias.unflatten(0, (of.groups.num_heads, -1))[..., None]
        return combine(rows, of.coefficients[..., -1:], of.groups).flatten()


class _Linear(NamedTuple):
    """One projection of a grouped model, and the original's heads that it was merged from."""

    site: str
    role: str
    module: nn.Linear
    heads: Float[Tensor, "head dim model_plus_1"]
    groups: Groups


def attach(
    model: PreTrainedModel, sites: Iterable[Site], plan: Plan, read: Read, spec: str = "wgqa", *, seed: int = 0
) -> Options:
    """Make K and V of every folded site weighted sums of the original's heads, in place, and return the options in `spec`.

    `model` is the fold by `plan` as `headfold.load` opens it, `sites` are the original's, `read` returns the original's tensors by their
    names on disk. Coefficients and sums are in the model's dtype, float32 at least. `seed` is for `init=random`.

    The trained tensors are ordinary parameters: `<linear>.parametrizations.weight.original` (and `.bias.original`) are the
    original's heads, `<linear>.parametrizations.weight.0.coefficients` the coefficients, so optimizers and `state_dict` include
    them. To continue an interrupted training, attach to the fold again in the same way and load the state. What is saved while
    attached has these names: it is a state and not a model.

    Raises:
        UserError: an unknown option; a model that is not the fold by that plan, with the original's queries; a site whose q, k and v are
            one linear, or whose head_dim is larger than the source's; a model with WGQA attached.
    """
    options = parse(spec)
    if plan.quantised_cache:
        raise UserError(
            "wgqa: expected the original's keys and values, the plan rotates them; fold without --quantised-cache"
        )
    if attached(model):
        raise UserError("wgqa: expected a model without WGQA, got one that has it attached; fold it away first")
    found = [linear for site in _folded(sites, plan) for linear in _linears(model, site, plan, read)]
    trained = frozenset(name for name, parameter in model.named_parameters() if parameter.requires_grad)
    vars(model)[_TRAINED] = trained
    if options.frozen:
        model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for linear in found:
        _parametrize(linear, _initial(linear, options, generator))
    return options


def attached(model: nn.Module) -> list[WeightedHeads]:
    """Return the weighted heads attached to a model, in the order of its modules."""
    return [module for module in model.modules() if isinstance(module, WeightedHeads)]


def coefficients(model: nn.Module) -> dict[str, dict[str, Tensor]]:
    """Return the coefficients of `k` and `v` by site: (head,), (head, dim) or (head, model), the last with one more column for a
    bias.
    """
    found: dict[str, dict[str, Tensor]] = {}
    for heads in attached(model):
        values = heads.coefficients.detach().clone().flatten(1)
        found.setdefault(heads.site, {})[heads.role] = values[:, 0] if heads.coefficients[0].numel() == 1 else values
    return found


def trainable(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """Return the trained parameters, `coefficients` and `weights` separately: weight decay, which pulls to 0, harms the coefficients."""
    own = {id(heads.coefficients) for heads in attached(model)}
    found: dict[str, list[nn.Parameter]] = {"coefficients": [], "weights": []}
    for parameter in model.parameters():
        if parameter.requires_grad:
            found["coefficients" if id(parameter) in own else "weights"].append(parameter)
    return found


def fold_away(model: PreTrainedModel) -> None:
    """Replace the weighted sums by the grouped weights they amount to, in place; the model's outputs stay the same, bit for bit.

    Names, shapes and trained parameters are those from before `attach`. Optimizers created before this call are no longer valid.

    Raises:
        UserError: nothing is attached.
    """
    if not attached(model):
        raise UserError("wgqa: expected a model with WGQA attached, got one without; attach it first")
    for module in list(model.modules()):
        for name in _weighted(module):
            parametrize.remove_parametrizations(module, name, leave_parametrized=True)
            getattr(module, name).grad = None
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in vars(model)[_TRAINED])
    del vars(model)[_TRAINED]


def _weighted(module: nn.Module) -> list[str]:
    """Return the names of the module's tensors that are weighted sums."""
    parametrizations: Any = module.parametrizations if parametrize.is_parametrized(module) else {}
    return [name for name, (first, *_) in parametrizations.items() if isinstance(first, WeightedHeads | WeightedBiases)]


def _folded(sites: Iterable[Site], plan: Plan) -> list[Site]:
    """Return the sites that the plan gives fewer K/V heads."""
    planned = [site for site in sites if site.name in plan.sites]
    found = [site for site in planned if plan.sites[site.name].groups.num_kv_heads < site.num_kv_heads]
    if not found:
        raise UserError(
            "wgqa: expected a plan that gives some of these sites fewer K/V heads, got none; is it the plan of this model?"
        )
    return found


def _linears(model: PreTrainedModel, site: Site, plan: Plan, read: Read) -> Sequence[_Linear]:
    """Return the K and V projections of a site, checked to be what the plan made of the original."""
    _refuse(site, plan)
    heads, groups = read_heads(site, read), plan.sites[site.name].groups
    _check_rest(model, site, plan, read)
    return [_Linear(site.name, role, _linear(model, _path(site, role)), getattr(heads, role), groups) for role in "kv"]


def _refuse(site: Site, plan: Plan) -> None:
    """Refuse sites for which a weighted sum of the original's heads is not defined."""
    planned = plan.sites[site.name]
    if "qkv" in site.weights and site.stock_gqa:
        raise UserError(
            f"wgqa: {site.name}: expected linears of their own for k and v, its class has one for q, k and v"
        )
    if planned.head_dim != site.head_dim:
        raise UserError(
            f"wgqa: {site.name}: expected the original's head_dim {site.head_dim}, the plan has {planned.head_dim}: such a "
            "head stores several heads side by side, which leaves nothing to weight; make the plan with --head-dim-multiple 1"
        )
    if parse_merge(planned.merge).record.transforms_queries:
        raise UserError(
            f"wgqa: {site.name}: expected a merge that does not transform queries, the plan has {planned.merge}, so the "
            "original's keys do not fit the queries; fold with --merge mean --no-refit"
        )


def _linear(model: PreTrainedModel, path: str) -> nn.Linear:
    module = model.get_submodule(path)
    assert isinstance(module, nn.Linear), path
    return module


def _path(site: Site, role: str) -> str:
    """Return the path of a projection in the grouped model."""
    return site.paths.get(role, f"{site.core}.{role}_proj")


def _check_rest(model: PreTrainedModel, site: Site, plan: Plan, read: Read) -> None:
    """Check that the site except K and V is in the model as the plan leaves it, with the original's queries in the plan's order."""
    present, names = dict(model.named_parameters()), model_names(site)
    merged = {f"{_path(site, role)}.{suffix}" for role in "kv" for suffix in ("weight", "bias")}
    for on_disk, tensor in site_tensors(site, plan, read).items():
        name = names[on_disk]
        found = present.get(name)
        same = found is not None and found.shape == tensor.shape
        if found is not None and same and not (name in merged or found.is_meta):  # a meta model is only counted
            same = torch.equal(found, tensor.to(found))
        if not same:
            what = "no such parameter" if found is None else "other numbers"
            raise UserError(
                f"wgqa: {site.name}: expected {name} as the plan makes it of the original, found {what}; "
                "fold with --merge mean --no-refit --layout headfold, and attach before training"
            )


def _parametrize(linear: _Linear, weights: Float[Tensor, "head #dim #columns"]) -> None:
    """Set the original's heads as the linear's tensors, each behind its parametrization."""
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
    """Return the initial coefficients. They are drawn in float32, so that a seed means the same in every dtype."""
    num_heads, dim, columns = linear.heads.shape
    columns -= linear.module.bias is None
    shape = {"scalar": (1, 1), "column": (dim, 1), "row": (1, columns)}[options.kind]
    weight = linear.module.weight
    device, dtype = weight.device, torch.promote_types(weight.dtype, torch.float32)
    if options.init == "random":
        return torch.randn(num_heads, *shape, generator=generator).to(device, dtype)
    return equal_weights(linear.groups).expand(-1, *shape).to(device, dtype).clone()
