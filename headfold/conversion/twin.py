"""The head-repeated twin of a fold: the source with its attention weights replaced by the shared heads, each repeated."""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from torch import Tensor

from ..core.fitted import FittedHeads
from ..core.plan import Plan
from ..core.stats import SiteStats
from ..families.layout import planned_shapes
from ..families.spec import Site
from ..runtime.regrouping import install_heads, shared_tensors
from ..surgery import site_tensors
from .source import Source

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Twin(Mapping[str, Tensor]):
    """The twin's tensors by name on disk, in the source's shapes; one site is computed at a time."""

    def __init__(
        self,
        source: Source,
        plan: Plan,
        stats: Mapping[str, SiteStats] | None,
        refits: Mapping[str, FittedHeads] | None,
    ) -> None:
        self._source, self._plan, self._stats, self._refits = source, plan, stats, refits
        shape_of = {name: info.shape for name, info in source.checkpoint.tensors.items()}.__getitem__
        self._site_of = {
            tensor: site for site in source.sites for tensor in planned_shapes(site, site.num_kv_heads, shape_of)
        }
        self._last: tuple[str, dict[str, Tensor]] = ("", {})

    @property
    def has_head_dim_multiples(self) -> bool:
        """Whether some K/V heads have a multiple of the source's head_dim, which its shapes have no place for."""
        return any(multiple > 1 for multiple in self._plan.head_dim_multiples(self._source.sites).values())

    @property
    def names_on_disk(self) -> dict[str, str]:
        """Model parameter → tensor on disk, where they differ."""
        return {parameter: name for site in self._source.sites for name, parameter in site.parameters.items()}

    def install(self, model: "PreTrainedModel") -> "PreTrainedModel":
        """Install the twin in a model of the source, slot by slot at a head_dim multiple, under the source's RoPE frequencies."""
        for site in self._source.sites:
            tensors = self._tensors(site)
            multiple = self._plan.sites[site.name].head_dim // site.head_dim
            if multiple > 1:
                install_heads(model, site, tensors, site.num_kv_heads, multiple)
                tensors = shared_tensors(site, tensors)
            for name, tensor in tensors.items():
                parameter = model.get_parameter(site.parameters.get(name, name))
                parameter.data.copy_(tensor)
        return model

    def _tensors(self, site: Site) -> dict[str, Tensor]:
        read = self._source.checkpoint.read
        return site_tensors(site, self._plan, read, self._stats, self._refits, num_kv_heads=site.num_kv_heads)

    def __getitem__(self, name: str) -> Tensor:
        site = self._site_of[name]
        if self._last[0] != site.name:
            self._last = (site.name, self._tensors(site))
        return self._last[1][name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._site_of)

    def __len__(self) -> int:
        return len(self._site_of)
