"""Fitted heads on disk, one file per site: a killed fold resumes from them, and each site is merged once."""

from collections.abc import Iterator, Mapping
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..checkpoint.disk import disk_errors, flush, require_space


class FittedSites(Mapping[str, Mapping[str, Tensor]]):
    """The fitted fields of each site's heads (`surgery.Refits`), read when asked for; one site is in memory at a time."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        for left in directory.glob("*.partial"):
            left.unlink()
        self._last: tuple[str, dict[str, Tensor]] = ("", {})

    def put(self, site: str, fields: Mapping[str, Tensor], facts: Mapping[str, str]) -> None:
        """Keep a site's fields with the facts of the data that they were fitted on; the file appears whole or not at all.

        Raises:
            UserError: the disk is full or the place cannot be written to.
        """
        path = self._path(site)
        size = sum(tensor.nbytes for tensor in fields.values())
        partial = path.with_suffix(".partial")
        with disk_errors(path, size):
            require_space(self._directory, size)
            save_file({name: tensor.contiguous() for name, tensor in fields.items()}, partial, dict(facts))
            flush(partial)
            partial.replace(path)

    @property
    def facts(self) -> dict[str, str]:
        """The facts of the data that all sites were fitted on; empty where no site is there."""
        for site in self:
            with safe_open(self._path(site), "pt") as file:
                return dict(sorted((file.metadata() or {}).items()))
        return {}

    def __getitem__(self, site: str) -> Mapping[str, Tensor]:
        if site not in self:
            raise KeyError(site)
        if self._last[0] != site:
            self._last = (site, load_file(self._path(site)))
        return self._last[1]

    def __contains__(self, site: object) -> bool:
        return self._path(str(site)).exists()

    def __iter__(self) -> Iterator[str]:
        return (path.stem for path in sorted(self._directory.glob("*.safetensors")))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def _path(self, site: str) -> Path:
        return self._directory / f"{site}.safetensors"
