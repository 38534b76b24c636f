"""Fitted heads on disk, a file per site, from which a killed fold goes on."""

from collections.abc import Iterator, Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from ..checkpoint.disk import disk_errors, flush, require_space
from ..core.errors import UserError
from ..core.fitted import FittedHeads


class FittedSites(Mapping[str, FittedHeads]):
    """A mapping from sites to their fitted weights, each read when it is asked for; one site is held in memory at a time."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        for left in directory.glob("*.partial"):
            left.unlink()
        self._last: tuple[str, FittedHeads] | None = None

    def put(self, site: str, fitted: FittedHeads, facts: Mapping[str, str]) -> None:
        """Keep a site's fields, and the facts of what they were fitted on; the file appears whole or not at all.

        Raises:
            UserError: the place is full or may not be written to.
        """
        path = self._path(site)
        tensors = {name: tensor.contiguous() for name, tensor in fitted.to_tensors().items()}
        size = sum(tensor.nbytes for tensor in tensors.values())
        partial = path.with_suffix(".partial")
        with disk_errors(path, size):
            require_space(self._directory, size)
            save_file(tensors, partial, dict(facts))
            flush(partial)
            partial.replace(path)

    @property
    def facts(self) -> dict[str, str]:
        """The facts of the data that the sites were fitted on, the same for all sites; empty if no site is fitted."""
        for site in self:
            self[site]  # a corrupt file is named
            with safe_open(self._path(site), "pt") as file:
                return dict(sorted((file.metadata() or {}).items()))
        return {}

    def __getitem__(self, site: str) -> FittedHeads:
        if site not in self:
            raise KeyError(site)
        if self._last is None or self._last[0] != site:
            self._last = (site, self._read(site))
        return self._last[1]

    def _read(self, site: str) -> FittedHeads:
        try:
            return FittedHeads.from_tensors(load_file(self._path(site)))
        except (SafetensorError, LookupError, TypeError, ValueError, RuntimeError, AssertionError) as error:
            raise UserError(
                f"{self._path(site)}: expected the fitted heads of an earlier run, got a corrupt file; remove it, and they are fitted again"
            ) from error

    def __contains__(self, site: object) -> bool:
        return self._path(str(site)).exists()

    def __iter__(self) -> Iterator[str]:
        return (path.stem for path in sorted(self._directory.glob("*.safetensors")))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def _path(self, site: str) -> Path:
        return self._directory / f"{site}.safetensors"
