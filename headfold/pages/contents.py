"""What a page is made of: records of folds, comparisons, frontiers, measurements and samples, as sections take them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from ..comparison import MethodRow
from ..conversion.serving_cost import ServingCost
from ..core.plan import Plan
from ..serving.engine import quoted
from .cards import Card


@dataclass(frozen=True, slots=True)
class Fold:
    """A folded checkpoint."""

    path: Path
    name: str
    """The directory's own name, which tells folds apart on the page."""
    kind: str
    """The kind of data that the model takes (`corpus.samples.kind_of`)."""
    base_model: str
    """The original, as the card names it; empty where it does not."""
    card: Card
    plan: Plan
    query_heads: Mapping[str, int]
    """Query heads that read one K/V head of the original, by site."""
    kv_bytes_per_token: int | None
    """As the config counts it; None where it has no such fields."""
    weight_bytes: int
    """Bytes of all weights on disk."""

    @property
    def word(self) -> str:
        """Its path as a word of a shell command."""
        return quoted(self.path)


@dataclass(frozen=True, slots=True)
class Original:
    """The checkpoint that folds were made of, where it is at hand."""

    path: Path
    weight_bytes: int
    costs: Mapping[str, tuple[ServingCost, ServingCost]]
    """Serving costs of the original and of the fold, by the fold's name."""


@dataclass(frozen=True, slots=True)
class MethodTable:
    """The rows of a folder of `headfold compare`."""

    name: str
    rows: Sequence[MethodRow]
    lost: Sequence[str] = ()
    """Methods that broke the model: their loss is no finite number."""


@runtime_checkable
class FrontPoint(Protocol):
    """A point of a frontier (`budget.frontier.Point`)."""

    @property
    def plan(self) -> str: ...
    @property
    def kv_bytes_per_token(self) -> int: ...
    @property
    def num_kv_heads(self) -> Mapping[str, int]: ...
    @property
    def predicted(self) -> float: ...
    @property
    def measured(self) -> float | None: ...
    @property
    def uniform(self) -> bool: ...
    @property
    def head_dim_multiple(self) -> int: ...
    @property
    def weight_bytes(self) -> int: ...


@dataclass(frozen=True, slots=True)
class Front:
    """A folder of `headfold frontier`: its points, and what single sites were measured to lose by the count of their K/V heads."""

    name: str
    directory: str
    points: Sequence[Any]
    """Each a `FrontPoint`."""
    rank_correlation: float | None
    site_rank_correlation: float | None
    sensitivities: Mapping[str, Mapping[int, float]]


@dataclass(frozen=True, slots=True)
class Served:
    """How an engine is installed, and the command by which it serves a fold."""

    engine: str
    install: str
    serve: str


@dataclass(frozen=True, slots=True)
class Continuation:
    """What a model writes after a prompt, as pieces of text, one per token."""

    pieces: Sequence[str]
    num_same: int
    """Pieces until it parts from the original."""
    num_agreeing: int
    """Tokens of the original's text that it would have chosen too, each after the original's own words."""
    others: Sequence[tuple[str, str]]
    """The original's token and its own choice, where they differ so."""


@dataclass(frozen=True, slots=True)
class TextSample:
    """A prompt, what the original writes after it, and what each fold writes, by name."""

    prompt: str
    original: Sequence[str]
    folds: Mapping[str, Continuation]


@dataclass(frozen=True, slots=True)
class OutputSample:
    """What the original and each fold, by name, write for one input: a text, or a recording."""

    given: str
    """The text, or which recording it is."""
    expected: str
    """What the data have for it: a translation, or what is said; empty where they have none."""
    original: str
    folds: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Contents:
    """Everything that a page shows."""

    folds: Sequence[Fold] = ()
    original: Original | None = None
    tables: Sequence[MethodTable] = ()
    fronts: Sequence[Front] = ()
    results: Sequence[Any] = ()
    """What `eval`, `bench` and `check` printed with --json (`results.Result`)."""
    samples: Sequence[TextSample | OutputSample] = ()
    no_samples: str = ""
    """Why there are no samples."""
    served: Mapping[str, Sequence[Served] | str] = field(default_factory=dict)
    """By fold: the engines, or why there are none."""

    def original_of(self, fold: Fold) -> str:
        """Return the original of a fold as a word of a shell command: where it lies, or what the card calls it."""
        at_hand = None if self.original is None else self.original.path
        return quoted(at_hand or Path(fold.base_model or "ORIGINAL"))
