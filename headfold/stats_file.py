"""Calibration statistics on disk: safetensors files with a tensor per site and statistic, and token counts in the metadata."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .checkpoint.disk import replacing, require_space
from .checkpoint.headers import Header, TensorInfo, encode_header, num_bytes
from .checkpoint.target import PAGE
from .checkpoint.transfer import raw_bytes, read_into, write_all
from .core.errors import UserError
from .core.files import regular_file
from .core.json_input import parse_object
from .core.stats import SiteStats

_COUNTS = "headfold.counts"
"""Metadata key: JSON, number of tokens per site."""
_SAMPLE = "sample/"
"""Prefix of the names of the calibration data."""
_ANEW = "run headfold calibrate again"
_MOST_TOKENS = 2**63 - 1
_FAR = 10**18
"""An offset with more digits than any in a file."""
SAMPLE_BYTES = 2**28
"""Larger calibration data is not stored with its statistics, but drawn again."""


def write_stats(
    path: Path,
    sites: Mapping[str, SiteStats],
    metadata: Mapping[str, str],
    sample: Mapping[str, Tensor] | None = None,
) -> None:
    """Write the sums of all sites; the file is never incomplete. `sample` as in `writing_stats`.

    Raises:
        UserError: the place is full or cannot be written to.
    """
    shapes = {site: {name: tuple(t.shape) for name, t in stats.tensors.items()} for site, stats in sites.items()}
    with writing_stats(path, shapes, metadata, sample) as writer:
        for site, stats in sites.items():
            writer.put(site, stats)


@contextmanager
def writing_stats(
    path: Path,
    shapes: Mapping[str, Mapping[str, tuple[int, ...]]],
    metadata: Mapping[str, str],
    sample: Mapping[str, Tensor] | None = None,
) -> Iterator["StatsWriter"]:
    """Yield a writer of the sums of one site after another; the file takes its place, whole, when the body ends without an error.

    `shapes` gives by site the statistics that it may have. `sample` is the calibration data itself, so that a refit can use the same
    data as the statistics.

    Raises:
        UserError: the place is full, or has no room for all of them, or cannot be written to.
    """
    path = Path(path)
    kept = {name: t.to(torch.int32) if t.dtype == torch.int64 else t for name, t in (sample or {}).items()}
    if sum(t.nbytes for t in kept.values()) > SAMPLE_BYTES:
        kept = {}
    size = sum(num_bytes(torch.float64, shape) for of_site in shapes.values() for shape in of_site.values())
    size += sum(t.nbytes for t in kept.values())
    with replacing(path, size) as temporary:
        require_space(path.parent, size)
        with temporary.open("r+b", buffering=0) as file:
            writer = StatsWriter(file.fileno(), shapes, metadata, kept)
            yield writer
            writer.finish()


class StatsWriter:
    """Writes the sums of sites into an open file as they come, so that those of one site are in memory."""

    def __init__(
        self,
        descriptor: int,
        shapes: Mapping[str, Mapping[str, tuple[int, ...]]],
        metadata: Mapping[str, str],
        sample: Mapping[str, Tensor],
    ) -> None:
        self._descriptor, self._metadata = descriptor, metadata
        # The widest numbers first, as the sums are wide too, so that every tensor begins at a multiple of their size.
        ordered = sorted(sample.items(), key=lambda item: -item[1].dtype.itemsize)
        self._sample = {f"{_SAMPLE}{name}": tensor.contiguous() for name, tensor in ordered}
        self._tensors: dict[str, TensorInfo] = {}
        self._counts: dict[str, int] = {}
        self._end = 0
        # The header comes first and is known last, so the longest that it can be is left free.
        longest = {
            f"{site}/{name}": TensorInfo(torch.float64, shape, "", _FAR, _FAR)
            for site, of_site in shapes.items()
            for name, shape in of_site.items()
        } | {name: TensorInfo(t.dtype, tuple(t.shape), "", _FAR, _FAR) for name, t in self._sample.items()}
        self._begin = len(self._header(longest, dict.fromkeys(shapes, _MOST_TOKENS), PAGE))

    def put(self, site: str, stats: SiteStats) -> None:
        """Write the sums of a site, in the place of earlier ones of it."""
        for name, tensor in stats.tensors.items():
            assert tensor.dtype == torch.float64, (site, name, tensor.dtype)
            self._write(f"{site}/{name}", tensor.contiguous())
        self._counts[site] = stats.count

    def get(self, site: str) -> SiteStats | None:
        """Return the sums of a site that were put here, None if there are none."""
        found: dict[str, Tensor] = {}
        for key, info in self._tensors.items():
            if key.rpartition("/")[0] == site:
                found[key.removeprefix(f"{site}/")] = tensor = torch.empty(info.shape, dtype=info.dtype)
                read_into(self._descriptor, raw_bytes(tensor), self._begin + info.start)
        return SiteStats(found, self._counts[site]) if found else None

    def finish(self) -> None:
        """Write the calibration data and the header."""
        for name, tensor in self._sample.items():
            self._write(name, tensor)
        header = self._header(self._tensors, self._counts, self._begin)
        assert len(header) == self._begin, "statistics that were not announced"
        write_all(self._descriptor, header, 0)

    def _header(self, tensors: dict[str, TensorInfo], counts: Mapping[str, int], page: int) -> bytes:
        return encode_header(Header(tensors, {**self._metadata, _COUNTS: json.dumps(counts)}), page=page)

    def _write(self, name: str, tensor: Tensor) -> None:
        if name not in self._tensors:
            start, self._end = self._end, self._end + tensor.nbytes
            self._tensors[name] = TensorInfo(tensor.dtype, tuple(tensor.shape), "", start, self._end)
        write_all(self._descriptor, raw_bytes(tensor), self._begin + self._tensors[name].start)


_MOST = 1e100
"""More than sums of squares of float32 numbers come to."""


class StatsFile(Mapping[str, SiteStats]):
    """The statistics of a file by site, each read when it is requested; `metadata` describes what they were measured on.

    `parts` are files with other sites of the same calibration.

    Raises:
        UserError: there is no such file, `headfold calibrate` did not write it, or it has no statistics of a site.
    """

    def __init__(self, path: Path, parts: Sequence[Path] = ()) -> None:
        self.path = Path(path)
        self._file_of: dict[str, Path] = {}
        self._counts: dict[str, int] = {}
        self.metadata = self._added(self.path)
        for part in parts:
            self._added(part)

    def _added(self, path: Path) -> dict[str, str]:
        """Add a file and return its metadata."""
        regular_file(path, "statistics that headfold calibrate wrote")
        try:
            with safe_open(path, "pt") as file:
                everything, keys = file.metadata() or {}, list(file.keys())
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"{path}: expected statistics, got not a safetensors file ({error}); make them with headfold calibrate"
            ) from error
        if _COUNTS not in everything:
            raise UserError(f"{path}: expected statistics, got other tensors; make them with headfold calibrate")
        counts = parse_object(everything[_COUNTS].encode(), f"{path}: counts of tokens", _ANEW)
        for site, count in counts.items():
            if type(count) is not int or not 1 <= count < 2**63:
                raise UserError(f"{path}: {site}: expected a positive count of tokens, got {count!r:.60}; {_ANEW}")
            if lacking := [name for name in ("second", "scatter") if f"{site}/{name}" not in keys]:
                raise UserError(f"{path}: {site}: expected the statistic {lacking[0]}, got none; {_ANEW}")
        self._file_of |= dict.fromkeys(keys, path)
        self._counts |= counts
        # The library keeps no order, and a plan that quotes this must come out the same every time.
        return {key: value for key, value in sorted(everything.items()) if key != _COUNTS}

    def __getitem__(self, site: str) -> SiteStats:
        if site not in self._counts:
            raise UserError(
                f"{self.path.name} has no statistics for {site} (it lists {len(self)} sites of another model?); "
                "run headfold calibrate on this model"
            )
        found = {
            key.removeprefix(f"{site}/"): file for key, file in self._file_of.items() if key.rpartition("/")[0] == site
        }
        with safe_open(next(iter(found.values()), self.path), "pt") as file:
            sums = {name: file.get_tensor(f"{site}/{name}") for name in found}
        for name, total in sums.items():
            if not (total.is_floating_point() and total.isfinite().all() and _may_be_sums(name, total)):
                raise UserError(
                    f"{self.path}: {site}/{name}: expected finite sums of squares, got other numbers; {_ANEW}"
                )
        return SiteStats(sums, self._counts[site])

    def shape(self, site: str, name: str) -> tuple[int, ...] | None:
        """Return the shape of a statistic of a site, None if it was not measured there; nothing else is read."""
        if not self.holds(site, name):
            return None
        with safe_open(self._file_of[f"{site}/{name}"], "pt") as file:
            return tuple(file.get_slice(f"{site}/{name}").get_shape())

    def sample(self) -> dict[str, Tensor] | None:
        """Return the calibration data, if it was stored."""
        names = [key.removeprefix(_SAMPLE) for key in self._file_of if key.startswith(_SAMPLE)]
        with safe_open(self.path, "pt") as file:
            found = {name: file.get_tensor(f"{_SAMPLE}{name}") for name in sorted(names)}
        return {name: t.to(torch.int64) if t.dtype == torch.int32 else t for name, t in found.items()} or None

    def positions_per_dim(self, site: str) -> float:
        """Return how many positions were measured at a site for each dim of its inputs: of its queries or of its keys, the fewer."""
        found = []
        for name in ("second", "query_second"):
            if self.holds(site, name):
                with safe_open(self._file_of[f"{site}/{name}"], "pt") as file:
                    sums = file.get_slice(f"{site}/{name}")
                    dims = sums.get_shape()[0] - 1
                    found.append(float(sums[dims:, dims:].sum()) / dims)
        return min(found)

    def holds(self, site: str, name: str) -> bool:
        """Return whether a statistic was measured at a site; nothing is read."""
        return f"{site}/{name}" in self._file_of

    def __contains__(self, site: object) -> bool:
        return site in self._counts

    def __iter__(self) -> Iterator[str]:
        return iter(self._counts)

    def __len__(self) -> int:
        return len(self._counts)


def _may_be_sums(name: str, total: Tensor) -> bool:
    """Return whether numbers can be what they are called: a second moment has no negative diagonal and was measured somewhere.

    A scatter is a difference of sums, whose rounding can leave any sign where texts are short. Weights are multiplied with the sums,
    and the products squared, so they have to leave room for that.
    """
    if float(total.abs().max()) > _MOST:
        return False
    if name == "attended":
        return bool((total >= 0).all())
    if total.ndim != 2 or name == "scatter":
        return total.ndim == 2
    squares = total.diagonal()
    return bool((squares >= 0).all()) and float(squares[-1]) > 0


def add_stats(a: StatsFile, b: StatsFile) -> dict[str, SiteStats]:
    """Return the sums over both calibrations, as if all their tokens had been used in one.

    Raises:
        UserError: the files are of different models or have different statistics.
    """
    for first, other in ((a, b), (b, a)):
        for site in first:
            other[site]
    differing = [site for site in a if _layout(a[site]) != _layout(b[site])]
    if differing:
        names = ", ".join(
            sorted({name for name, _ in _layout(a[differing[0]]).items() ^ _layout(b[differing[0]]).items()})
        )
        raise UserError(
            f"{b.path}: {differing[0]}: expected statistics as in {a.path}, but they differ in {names}; calibrate both with the same "
            "version on the same model"
        )
    return {site: a[site] + b[site] for site in a}


def _layout(stats: SiteStats) -> dict[str, tuple[int, ...]]:
    return {name: tuple(t.shape) for name, t in stats.tensors.items()}
