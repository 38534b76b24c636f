"""What a fold must equal: the source with its attention replaced by the shared heads, each repeated."""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from torch import Tensor

from ..checkpoint.stats_file import StatsFile
from ..core.fitted import FittedHeads
from ..core.plan import Plan
from ..families.layout import planned_shapes
from ..families.spec import Site
from ..runtime.regrouping import install_heads
from ..surgery import site_tensors
from .source import Source

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Twin(Mapping[str, Tensor]):
    """The head-repeated twin's tensors by name on disk, in the source's shapes, one site made at a time."""

    def __init__(
        self, source: Source, plan: Plan, stats: StatsFile | None, refits: Mapping[str, FittedHeads] | None
    ) -> None:
        self._source, self._plan, self._stats, self._refits = source, plan, stats, refits
        shape_of = {name: info.shape for name, info in source.checkpoint.tensors.items()}.__getitem__
        self._site_of = {
            tensor: site for site in source.sites for tensor in planned_shapes(site, site.num_kv_heads, shape_of)
        }
        self._last: tuple[str, dict[str, Tensor]] = ("", {})

    @property
    def renamed(self) -> dict[str, str]:
        """Names on disk of the parameters that the model calls otherwise."""
        return {parameter: name for site in self._source.sites for name, parameter in site.parameters.items()}

    def install_heads(self, model: "PreTrainedModel") -> "PreTrainedModel":
        """The twin in a model of the source, where heads are wide: slot by slot, under the source's own table of frequencies."""
        for site in self._source.sites:
            tensors = self._made(site)
            width = self._plan.sites[site.name].head_dim // site.head_dim
            if width > 1:
                install_heads(model, site, tensors, site.num_kv_heads, width)
                continue
            for name, tensor in tensors.items():
                parameter = model.get_parameter(site.parameters.get(name, name))
                parameter.data.copy_(tensor)
        return model

    def _made(self, site: Site) -> dict[str, Tensor]:
        read = self._source.checkpoint.read
        return site_tensors(site, self._plan, read, self._stats, self._refits, num_kv_heads=site.num_kv_heads)

    def __getitem__(self, name: str) -> Tensor:
        site = self._site_of[name]
        if self._last[0] != site.name:
            self._last = (site.name, self._made(site))
        return self._last[1][name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._site_of)

    def __len__(self) -> int:
        return len(self._site_of)
