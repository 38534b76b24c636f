"""Fitted heads on disk, a file per site, from which a killed fold goes on."""

from collections.abc import Iterator, Mapping
from pathlib import Path

from ..core.fitted import FittedHeads
from .site_files import SiteFiles


class FittedSites(Mapping[str, FittedHeads]):
    """A mapping from sites to their fitted weights, each read when it is asked for; one site is held in memory at a time."""

    def __init__(self, directory: Path) -> None:
        self._files = SiteFiles(directory)
        self._last: tuple[str, FittedHeads] | None = None

    def put(self, site: str, fitted: FittedHeads, facts: Mapping[str, str]) -> None:
        """Keep a site's fields, and the facts of what they were fitted on; the file appears whole or not at all.

        Raises:
            UserError: the place is full or may not be written to.
        """
        self._files.put(site, fitted.to_tensors(), facts)

    @property
    def facts(self) -> dict[str, str]:
        """The facts of the data that the sites were fitted on, the same for all sites; empty if no site is fitted."""
        for site in self:
            self[site]  # a corrupt file is named
            return self._files.facts(site)
        return {}

    def __getitem__(self, site: str) -> FittedHeads:
        if site not in self:
            raise KeyError(site)
        if self._last is None or self._last[0] != site:
            self._last = (site, self._read(site))
        return self._last[1]

    def _read(self, site: str) -> FittedHeads:
        tensors = self._files.tensors(site)
        try:
            return FittedHeads.from_tensors(tensors)
        except (LookupError, TypeError, ValueError, RuntimeError, AssertionError) as error:
            raise self._files.corrupt(site) from error

    def __contains__(self, site: object) -> bool:
        return site in self._files

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return sum(1 for _ in self)
