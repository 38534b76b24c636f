"""Routes at work: a model whose query heads choose their K/V heads as it runs, and that choice settled into ordinary groups.

K and V, their weights and their cache, never change with a route: only who reads them. The choice is discrete, so gradients reach Q,
K and V as in any grouped model. What a route remembers lies in buffers, `<attention>.headfold_route.*`, which `save_pretrained` and
a Trainer's checkpoints keep and `load_state_dict` brings back to a model with the same route attached. Among several processes each
cuts by its own batches; DistributedDataParallel hands the first one's buffers to all. In the recomputation that gradient
checkpointing makes, nothing is cut or drawn anew.
"""

import random
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..calibration import run
from ..core import plugins
from ..core.errors import UserError
from ..core.groups import Groups
from ..core.methods import RouteMethod
from ..core.plan import Plan, SitePlan
from ..core.routes import Norms, RouteState, even, runs
from . import routes
from .load import takes_attention
from .modeling_headfold import SiteConfig, own_forward

KvOfQuery = tuple[int, ...]


def parse(text: str) -> plugins.Method[RouteMethod]:
    """`dgqa:window=300` → the route of that name on a page in `headfold.runtime.routes`, with its options.

    Raises:
        UserError: no such route or option.
    """
    return plugins.parse(routes, text, RouteMethod)


def depends_on_batch(method: plugins.Method[RouteMethod]) -> bool:
    """Whether, outside training, what a model says of an item depends on the items beside it, or before."""
    return bool(method.options.get("published")) and method.record.published_depends_on_batch


def attach(model: PreTrainedModel, route: str = "static", *, seed: int = 0) -> dict[str, "Router"]:
    """Let every grouped attention of a model be routed, in place of what was attached before; routers by module path.

    The model is one of headfold's runtime (`headfold.load`), or of a stock class with grouped heads (Llama …), which is set to
    the attention `headfold`. Every router starts from the groups that the model has. `seed` is that of routes that draw.

    Raises:
        UserError: no such route or option; no attention with several K/V heads, each read by several query heads; a stock class whose
            attention cannot be named.
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
            f"{type(model).__name__}: expected a class that takes the attention headfold, this one has its own"
        )
    if stock:
        model.set_attn_implementation("headfold")
    return {path: _attach(path, *counts, method, seed) for path, counts in found.items()}


def detach(model: PreTrainedModel) -> None:
    """Take the routes off: every attention has the groups again that it had before."""
    for module in [module for module in model.modules() if hasattr(module, "headfold_route")]:
        for name, value in module.headfold_route.before.items():
            setattr(module, name, value)
        del module.headfold_route


def routers(model: PreTrainedModel) -> dict[str, "Router"]:
    """Those attached, by the path of their attention.

    Raises:
        UserError: there are none.
    """
    found = {name: module.headfold_route for name, module in model.named_modules() if hasattr(module, "headfold_route")}
    if not found:
        raise UserError(f"{type(model).__name__}: expected a routed model, found no route; attach one first")
    return found


def new_epoch(model: PreTrainedModel) -> None:
    """Count the steps of windows from 0 again, as the published DGQA does at every epoch."""
    for router in routers(model).values():
        router.state = replace(router.state, step=0)


@torch.no_grad()
def freeze(model: PreTrainedModel, batches: Iterable[Mapping[str, Tensor]] = ()) -> dict[str, KvOfQuery]:
    """Settle every route for good; returns, by module path, query head → K/V head.

    What counts is the state after training, settled, and on top of it the norms of `batches` (keyword arguments of the model). These
    run in eval mode with the groups as they stand then, whatever a batch would call for, and are measured as steps of training are.
    From then on every router repeats its map, in training too.

    Raises:
        UserError: no routes are attached, or nothing has been measured by one that goes by norms.
    """
    found, was_training = routers(model), model.training
    model.eval()
    for router in found.values():
        router.observe()
    for batch in batches:
        run(model, batch)
    for path, router in found.items():
        router.freeze(path)
    model.train(was_training)
    return {path: router.kv_of_query for path, router in found.items()}


def frozen_plan(model: PreTrainedModel, source: str, calibration: Mapping[str, str] = MappingProxyType({})) -> Plan:
    """The settled routes of a model as a plan: at every site, named by its module, query head → K/V head.

    It says who reads what. `source` is the fingerprint of the routed checkpoint, whose K and V stay as they are.

    Raises:
        UserError: a route that is not frozen, or a K/V head that no query reads.
    """
    found, sites = routers(model), {}
    for path, router in found.items():
        if not router.is_frozen:
            raise UserError(f"{path}: expected a frozen route, got one that still moves; call freeze first")
        if 0 in router.state.sizes:
            raise UserError(
                f"{path}: K/V head {router.state.sizes.index(0)} is left without a query, which no checkpoint can say; "
                "leave published=true out, the repaired route keeps one for each"
            )
        sites[path] = SitePlan(Groups(router.kv_of_query), "route", router.head_dim)
    return Plan(sites, str(next(iter(found.values())).method), source, 0, dict(calibration))


@dataclass(frozen=True, slots=True)
class Shape:
    """Heads of one attention."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    slots: int = 1
    """Parts that a wide head lies in."""


class Router(nn.Module):
    """The route of one attention: its page, its options, and in buffers what it remembers."""

    def __init__(
        self, method: plugins.Method[RouteMethod], shape: Shape, own: KvOfQuery, seed: int, before: dict[str, Any]
    ) -> None:
        """`own` is the map that the attention has by itself, `before` what of the module is put back by `detach`."""
        super().__init__()
        self.method, self.seed, self.before = method, seed, before
        self._held: KvOfQuery | None = None
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
        """Query head → K/V head for this pass, from the keys (sample, group · slot, position, dim) that it sees, cached ones too."""
        if not self.is_frozen and not _recomputing():
            norms = key_norms(key, mask, self._slots)
            if not norms.whole.isfinite().all():
                raise UserError(f"{self.method}: expected finite keys, got norms that are not; has training diverged?")
            self.state = self.method(self.state, norms, self.training or self._held is not None, seed=self.seed)
        return self._held or self.kv_of_query

    def perturbed(self, output: Tensor) -> Tensor:
        """The output of the attention (sample, token, head, dim) as the route leaves it."""
        perturb = self.method.record.perturb
        if perturb is None or self.is_frozen or self._held:
            return output
        draw = random.Random(f"{self.seed} {self.state.draws}").getrandbits(63)
        generator = torch.Generator(output.device).manual_seed(draw)
        return perturb(output, self.state.sizes, self.training, generator, **self.method.options)

    def observe(self) -> None:
        """Settle on what training has measured, if it has, and keep to that while more is measured."""
        if self.state.count and not self.is_frozen:
            self._settle()
        self._held = self.kv_of_query

    def freeze(self, where: str) -> None:
        """Settle on what has been measured, for good; `where` names the attention."""
        self._held = None
        if self.method.record.settle is not None and not self.is_frozen:
            if not (self.state.count or self.state.step):
                raise UserError(f"{where}: {self.method}: nothing was measured; train first, or give batches")
            self._settle()
        self.counts[3] = 1

    def _settle(self) -> None:
        settle = self.method.record.settle
        self.state = settle(self.state, **self.method.options) if settle else self.state


def key_norms(key: Tensor, mask: Tensor | None, slots: int = 1) -> Norms:
    """Lengths of keys (sample, group · slot, position, dim) by K/V head, in float32 or better.

    Positions count that the mask (sample or 1, head or 1, token, position; boolean, or added) lets some query see; all without one.
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
    """Whether this forward pass runs inside a backward one."""
    return torch._C._current_graph_task_id() != -1


def _grouped(model: PreTrainedModel) -> Iterator[tuple[str, tuple[nn.Module, Shape]]]:
    """Attentions, by path, whose query heads have a choice."""
    for path, module in model.named_modules():
        shape = _shape(module)
        if shape is not None and 1 < shape.num_kv_heads < shape.num_heads:
            yield path, (module, shape)


def _shape(module: nn.Module) -> Shape | None:
    """As the runtime lists it or, of a stock class, as its attention has it; None where the module is no attention."""
    site = getattr(module, "headfold_site", None)
    if site is not None:
        return Shape(site["heads"], site["kv_heads"], site["head_dim"], site.get("slots", 1))
    per_group, head_dim = getattr(module, "num_key_value_groups", None), getattr(module, "head_dim", None)
    if not (isinstance(per_group, int) and isinstance(head_dim, int) and hasattr(module, "config")):
        return None
    query = getattr(module, "q_proj", None)
    num_heads = query.out_features // head_dim if isinstance(query, nn.Linear) else module.config.num_attention_heads
    return Shape(num_heads, num_heads // per_group, head_dim)


def _attach(path: str, module: nn.Module, shape: Shape, method: plugins.Method[RouteMethod], seed: int) -> Router:
    names = ("kv_of_query", "num_key_value_groups", "config")
    before = {name: getattr(module, name) for name in names if hasattr(module, name)}
    own = before.setdefault("kv_of_query", None) or runs(even(shape.num_heads, shape.num_kv_heads))
    drawn = random.Random(f"{seed} {path}").getrandbits(32)
    router = Router(method, shape, own, drawn, before).train(module.training)
    module.headfold_route = router.to(next(module.parameters()).device)
    module.kv_of_query, module.num_key_value_groups = own, 1
    if not (hasattr(module, "headfold_site") and own_forward(type(module))):  # an own forward asks for the map itself
        config = module.config
        module.config = SiteConfig(config._config if isinstance(config, SiteConfig) else config, special=True)
    return router
