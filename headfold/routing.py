"""Routes while they run: query heads choose their K/V heads in every forward pass, until the choice is frozen into ordinary groups.

K and V, their weights and their cache, never change with a route, only which query reads them. The choice is discrete, so
gradients reach Q, K and V as in any grouped model. The state of a route is in buffers, `<attention>.headfold_route.*`, which
`save_pretrained` and a Trainer's checkpoints save and `load_state_dict` restores in a model with the same route attached. Among
several processes each routes by its own batches while it trains; DistributedDataParallel copies the first one's buffers to all.
The batches that a route is frozen on are shared by the processes of a verb. In the recomputation of gradient checkpointing nothing
is measured or drawn again.
"""

import random
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Protocol, cast, runtime_checkable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .calibration import run
from .core import plugins
from .core.errors import UserError
from .core.groups import Groups
from .core.methods import RouteMethod
from .core.plan import Plan, SitePlan
from .core.routes import Norms, RouteState, even, runs
from .families.wrapped import is_in_language_model
from .parallel import run_shared
from .runtime import routes
from .runtime.load import takes_attention
from .runtime.modeling_headfold import SiteConfig, own_forward

KvOfQuery = tuple[int, ...]


@runtime_checkable
class GroupedAttention(Protocol):
    """The attributes of an attention module with grouped heads that a route reads and sets."""

    config: Any
    kv_of_query: KvOfQuery | None
    num_key_value_groups: int
    headfold_route: "Router"


def parse(text: str) -> plugins.Method[RouteMethod]:
    """Return the route `dgqa:window=300`, from a page in `headfold.runtime.routes`, with its options.

    Raises:
        UserError: an unknown route or option.
    """
    return plugins.parse(routes, text, RouteMethod)


def depends_on_batch(method: plugins.Method[RouteMethod]) -> bool:
    """Return whether, outside training, the output for one item depends on the items beside or before it."""
    return bool(method.options.get("published")) and method.record.published_depends_on_batch


def attach(model: PreTrainedModel, route: str = "static", *, seed: int = 0) -> dict[str, "Router"]:
    """Attach a route to every grouped attention of a model, instead of any route attached before, and return the routers by module path.

    The model is one of headfold's runtime (`headfold.load`), or of a stock class with grouped heads (Llama …), which is then set to the
    attention `headfold`. Every router starts from the groups that the model has. `seed` is for routes that draw random numbers.

    Raises:
        UserError: an unknown route or option; no attention with several K/V heads that each serve several query heads; a stock
            class that
            does not take attention by name.
    """
    method = parse(route)
    detach(model)
    found = dict(_grouped(model))
    if not found:
        raise UserError(
            f"{type(model).__name__}: expected attention with fewer K/V heads than query heads, and at least 2, to route between; "
            "found none: fold the model first"
        )
    stock = any(not hasattr(module, "headfold_site") for module, *_ in found.values())
    if stock and not takes_attention(model):
        raise UserError(
            f"{type(model).__name__}: expected a class that takes attention by name (headfold), got one with an attention of its own"
        )
    if stock:
        model.set_attn_implementation("headfold")
    return {path: _attach(path, *counts, method, seed) for path, counts in found.items()}


def detach(model: PreTrainedModel) -> None:
    """Remove the routes: every site gets back the groups that it had before."""
    for module in [module for module in model.modules() if hasattr(module, "headfold_route")]:
        for name, value in cast(GroupedAttention, module).headfold_route.before.items():
            setattr(module, name, value)
        del module.headfold_route


def routers(model: PreTrainedModel) -> dict[str, "Router"]:
    """Return the attached routers by the path of their attention.

    Raises:
        UserError: there are none.
    """
    found = {
        path: cast(GroupedAttention, module).headfold_route
        for path, module in model.named_modules()
        if hasattr(module, "headfold_route")
    }
    if not found:
        raise UserError(f"{type(model).__name__}: expected a routed model, found no route; attach one first")
    return found


def new_epoch(model: PreTrainedModel) -> None:
    """Restart the count of steps in a window at 0, as the published DGQA does at every epoch."""
    for router in routers(model).values():
        router.state = replace(router.state, step=0)


@torch.no_grad()
def freeze(model: PreTrainedModel, batches: Iterable[Mapping[str, Tensor]] = ()) -> dict[str, KvOfQuery]:
    """Freeze every route for good, and return query head → K/V head by module path.

    The frozen groups follow from the state after training, and in addition from the norms of `batches` (keyword arguments of the
    model). These batches run in eval mode with the present groups, whatever groups a batch alone would give, and are measured like
    training steps. After this every router returns its frozen map, in training too.

    Raises:
        UserError: no routes are attached, or a route that depends on norms has measured none.
    """
    found, was_training = routers(model), model.training
    model.eval()
    for router in found.values():
        router.observe()

    def measured(batch: Mapping[str, Tensor]) -> dict[str, list[Norms]]:
        run(model, batch)
        return {path: router.measured() for path, router in found.items()}

    for norms in run_shared(batches, measured):
        for path, router in found.items():
            router.add(norms[path])
    for path, router in found.items():
        router.freeze(path)
    model.train(was_training)
    return {path: router.kv_of_query for path, router in found.items()}


def frozen_plan(model: PreTrainedModel, source: str, calibration: Mapping[str, str] = MappingProxyType({})) -> Plan:
    """Return the frozen routes of a model as a plan: at every site, named by its module path, query head → K/V head.

    `source` is the fingerprint of the routed checkpoint, whose K and V remain as they are.

    Raises:
        UserError: a route that is not frozen, or a K/V head that no query reads.
    """
    found, sites = routers(model), {}
    for path, router in found.items():
        if not router.is_frozen:
            raise UserError(f"{path}: expected a frozen route, got one that still changes; call freeze first")
        if 0 in router.state.sizes:
            raise UserError(
                f"{path}: K/V head {router.state.sizes.index(0)} has no query head, which no checkpoint can express; "
                "leave out published=true, as the repaired route keeps one for each"
            )
        sites[path] = SitePlan(Groups(router.kv_of_query), "route", router.head_dim)
    return Plan(sites, str(next(iter(found.values())).method), source, 0, dict(calibration))


@dataclass(frozen=True, slots=True)
class Shape:
    """The numbers of heads of one site."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    slots: int = 1
    """The number of parts that a head with a larger head_dim is stored in."""


class Router(nn.Module):
    """The route of one site: its page and its options, with its state in buffers."""

    sizes: Tensor
    counts: Tensor
    kept: Tensor
    mean: Tensor

    def __init__(
        self, method: plugins.Method[RouteMethod], shape: Shape, own: KvOfQuery, seed: int, before: dict[str, Any]
    ) -> None:
        """`own` is the map that the attention has by itself, `before` the attributes of the module that `detach` restores."""
        super().__init__()
        self.method, self.seed, self.before = method, seed, before
        self._held: KvOfQuery | None = None
        self._norms: list[Norms] = []
        self._slots, self.head_dim, self._own = shape.slots, shape.head_dim, own
        sizes = [own.count(group) for group in range(shape.num_kv_heads)]
        self._own_sizes = tuple(sizes)
        self.register_buffer("sizes", torch.tensor(sizes))
        self.register_buffer("counts", torch.zeros(4, dtype=torch.long))  # samples, steps, draws, whether frozen
        self.register_buffer("kept", torch.zeros(shape.num_kv_heads))
        self.register_buffer("mean", torch.zeros(shape.num_kv_heads))

    @property
    def state(self) -> RouteState:
        count, step, draws, _ = self.counts.tolist()
        return RouteState(tuple(self.sizes.tolist()), self.kept, self.mean, count, step, draws)

    @state.setter
    def state(self, new: RouteState) -> None:
        self.sizes.copy_(torch.tensor(new.sizes))
        self.counts[:3] = torch.tensor([new.count, new.step, new.draws])
        self.kept.copy_(new.kept)  # first: it may be the mean
        self.mean.copy_(new.mean)

    @property
    def is_frozen(self) -> bool:
        return bool(self.counts[3])

    @property
    def kv_of_query(self) -> KvOfQuery:
        """The map as it is now."""
        sizes = tuple(self.sizes.tolist())
        return self._own if sizes == self._own_sizes else runs(sizes)

    @torch.no_grad()
    def forward(self, key: Tensor, mask: Tensor | None) -> KvOfQuery:
        """Return query head → K/V head for this pass, given its keys (sample, group · slot, position, dim), cached ones included."""
        if not self.is_frozen and not _recomputing():
            norms = key_norms(key, mask, self._slots)
            if not norms.whole.isfinite().all():
                raise UserError(f"{self.method}: expected finite keys, got norms that are not; has training diverged?")
            if self._held is None:
                self.state = self.method(self.state, norms, self.training, seed=self.seed)
            else:
                self._norms.append(Norms(norms.whole.cpu(), norms.per_token.cpu()))
        return self._held or self.kv_of_query

    def perturbed(self, output: Tensor) -> Tensor:
        """Return the output of the attention (sample, token, head, dim) with the noise of the route, where it has any."""
        perturb = self.method.record.perturb
        if perturb is None or self.is_frozen or self._held:
            return output
        draw = random.Random(f"{self.seed} {self.state.draws}").getrandbits(63)
        generator = torch.Generator(output.device).manual_seed(draw)
        return perturb(output, self.state.sizes, self.training, generator, **self.method.options)

    def observe(self) -> None:
        """Settle on what training has measured, if anything, and keep these groups while more is measured."""
        if self.state.count and not self.is_frozen:
            self._settle()
        self._held, self._norms = self.kv_of_query, []

    def measured(self) -> list[Norms]:
        """Return the norms since the last call, of passes with groups that are kept; they are not part of the state yet."""
        norms, self._norms = self._norms, []
        return norms

    def add(self, measured: list[Norms]) -> None:
        """Add norms to the state as training steps do."""
        device = self.kept.device
        for each in measured:
            norms = Norms(each.whole.to(device), each.per_token.to(device))
            self.state = self.method(self.state, norms, True, seed=self.seed)

    def freeze(self, where: str) -> None:
        """Settle on what has been measured, for good; `where` names the attention in messages."""
        self._held = None
        if self.method.record.settle is not None and not self.is_frozen:
            if not (self.state.count or self.state.step):
                raise UserError(
                    f"{where}: {self.method}: expected key norms to freeze on, got none; train first, or pass batches"
                )
            self._settle()
        self.counts[3] = 1

    def _settle(self) -> None:
        settle = self.method.record.settle
        self.state = settle(self.state, **self.method.options) if settle else self.state


def key_norms(key: Tensor, mask: Tensor | None, slots: int = 1) -> Norms:
    """Return the lengths of keys (sample, group · slot, position, dim) by K/V head, in float32 or better.

    With a mask (sample or 1, head or 1, token, position; boolean or additive) only positions count that some query may attend to.
    """
    wide = key.detach().to(torch.promote_types(key.dtype, torch.float32))
    energy = wide.pow(2).sum(-1).unflatten(1, (-1, slots)).sum(2)
    seen = torch.ones_like(energy[:, :1])
    if mask is not None:
        allowed = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
        seen = allowed.any(2).any(1, keepdim=True).expand_as(seen).to(energy)
    mean = (energy * seen).sum(-1) / seen.sum(-1).clamp_min(1)
    return Norms(energy.sum(-1).sqrt(), mean.sqrt())


def _recomputing() -> bool:
    """Return whether this forward pass runs inside a backward pass."""
    return torch._C._current_graph_task_id() != -1


def _grouped(model: PreTrainedModel) -> Iterator[tuple[str, tuple[nn.Module, Shape]]]:
    """Yield path, module and shape of every site whose query heads have a choice of K/V heads, and that text passes."""
    for path, module in model.named_modules():
        shape = _shape(module) if is_in_language_model(model.config.model_type, path) else None
        if shape is not None and 1 < shape.num_kv_heads < shape.num_heads:
            yield path, (module, shape)


def _shape(module: nn.Module) -> Shape | None:
    """Return the shape that the runtime lists, or that a stock class has; None where the module is no attention."""
    site: Any = getattr(module, "headfold_site", None)
    if site is not None:
        return Shape(site["heads"], site["kv_heads"], site["head_dim"], site.get("slots", 1))
    per_group, head_dim = getattr(module, "num_key_value_groups", None), getattr(module, "head_dim", None)
    if not (isinstance(per_group, int) and isinstance(head_dim, int) and hasattr(module, "config")):
        return None
    query = getattr(module, "q_proj", None)
    if isinstance(query, nn.Linear):
        num_heads = query.out_features // head_dim
    else:
        num_heads = cast(GroupedAttention, module).config.num_attention_heads
    return Shape(num_heads, num_heads // per_group, head_dim)


def _attach(path: str, attention: nn.Module, shape: Shape, method: plugins.Method[RouteMethod], seed: int) -> Router:
    module = cast(GroupedAttention, attention)
    names = ("kv_of_query", "num_key_value_groups", "config")
    before = {name: getattr(module, name) for name in names if hasattr(module, name)}
    own = before.setdefault("kv_of_query", None) or runs(even(shape.num_heads, shape.num_kv_heads))
    drawn = random.Random(f"{seed} {path}").getrandbits(32)
    router = Router(method, shape, own, drawn, before).train(attention.training)
    module.headfold_route = router.to(next(attention.parameters()).device)
    module.kv_of_query, module.num_key_value_groups = own, 1
    if not (
        hasattr(module, "headfold_site") and own_forward(type(attention))
    ):  # an own forward asks for the map itself
        config = module.config
        module.config = SiteConfig(config._config if isinstance(config, SiteConfig) else config, special=True)
    return router
