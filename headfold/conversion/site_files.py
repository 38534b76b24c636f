"""Tensors of single sites on disk, from which a killed job goes on."""

from collections.abc import Iterator, Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..checkpoint.disk import disk_errors, flush, require_space
from ..core.errors import UserError


class SiteFiles:
    """A directory with a file for each site; a file appears whole or not at all."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        for left in directory.glob("*.partial"):
            left.unlink()

    def put(self, site: str, tensors: Mapping[str, Tensor], facts: Mapping[str, str]) -> None:
        """Keep a site's tensors, and facts about them.

        Raises:
            UserError: the place is full or may not be written to.
        """
        path = self._path(site)
        whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
        size = sum(tensor.nbytes for tensor in whole.values())
        partial = path.with_suffix(".partial")
        with disk_errors(path, size):
            require_space(self._directory, size)
            save_file(whole, partial, dict(facts))
            flush(partial)
            partial.replace(path)

    def tensors(self, site: str) -> dict[str, Tensor]:
        """Return a site's tensors.

        Raises:
            UserError: the file is corrupt.
        """
        try:
            return load_file(self._path(site))
        except (SafetensorError, ValueError, RuntimeError) as error:
            raise self.corrupt(site) from error

    def facts(self, site: str) -> dict[str, str]:
        """Return what was kept with a site's tensors."""
        with safe_open(self._path(site), "pt") as file:
            return dict(sorted((file.metadata() or {}).items()))

    def corrupt(self, site: str) -> UserError:
        """Return an error that names the file of a site."""
        return UserError(
            f"{self._path(site)}: expected the fitted heads of an earlier run, got a corrupt file; remove it, and they are fitted again"
        )

    def __contains__(self, site: object) -> bool:
        return self._path(str(site)).exists()

    def __iter__(self) -> Iterator[str]:
        return (path.stem for path in sorted(self._directory.glob("*.safetensors")))

    def _path(self, site: str) -> Path:
        return self._directory / f"{site}.safetensors"
