"""The request and the config of calibration data."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from ..core.errors import UserError
from ..corpus.bounds import FROM_PYTHON
from ..corpus.samples import kind_of, main_input
from ..corpus.windows import fingerprint
from .source import Source

DEFAULT_SOURCE = "self"
DEFAULT_TOKENS = 65_536
DEFAULT_ITEMS = {
    "pairs": 2048,
    "sentences": 2048,
    "images": 512,
    "captions": 512,
    "spoken": 512,
    "audio": 512,
    "sound": 256,
}
"""Items by kind of data. More pairs make a better fold; as many large images would not fit into memory."""
_LEAST = {"tokens": 1, "items": 1, "context": 2, "seed": 0}
"""A window of one token predicts nothing."""
_KINDS_IN_WORDS = {
    "pairs": "pairs of text", "sentences": "sentences", "images": "images", "captions": "images with texts", "spoken": "sound with texts",
    "audio": "sound", "sound": "sound",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class CalibrationRequest:
    """Calibration data as the user names it; None stands for a default."""

    source: str | None = None
    tokens: int | None = None
    items: int | None = None
    columns: tuple[str, ...] = ()
    context: int | None = None
    seed: int = 0
    kind: str | None = None
    """Kind of data where a program gave them; by default what the model takes."""

    @classmethod
    def recorded(cls, facts: Mapping[str, str]) -> "CalibrationRequest | None":
        """Return the request that draws the data again which the metadata of statistics or a plan record; None where they name none.

        Raises:
            UserError: a number among them is none.
        """
        if not facts.keys() >= {"source", "seed", "tokens"}:
            return None
        is_text = facts.get("kind", "text") == "text"
        amount, columns = _recorded(facts, "tokens", 1), tuple(filter(None, facts.get("columns", "").split(",")))
        context = _recorded(facts, "context", 1) if is_text else None
        kind = facts["kind"] if facts.get("kind") in ("texts", "captions", "spoken") else None
        return cls(facts["source"], amount, amount, columns, context, _recorded(facts, "seed", 0), kind)

    def with_data_of(self, earlier: "CalibrationRequest") -> "CalibrationRequest":
        """Return the request for the data of an earlier one, in the amount and context of this one where it names them."""
        return replace(
            earlier,
            tokens=self.tokens or earlier.tokens,
            items=self.items or earlier.items,
            context=self.context or earlier.context,
        )

    @property
    def names_data(self) -> bool:
        """Whether the request names data of its own, rather than what was used before."""
        return (self.source, self.tokens, self.items, self.context) != (None, None, None, None)


def _recorded(facts: Mapping[str, str], name: str, least: int) -> int:
    """Return a number among the facts of calibration data that statistics or a plan record."""
    text = facts.get(name, "nothing")
    if not (text.isdecimal() and len(text) < 20 and int(text) >= least):
        raise UserError(
            f"calibration data recorded in the statistics or the plan: {name}: expected a whole number from {least} on, got "
            f"{text:.40}; name the data with --calibration, or calibrate again"
        )
    return int(text)


@dataclass(frozen=True, slots=True)
class CalibrationConfig:
    """Calibration data before any of it is read. `tokens` counts packed text, `items` everything else."""

    kind: str
    """Kind of data (`headfold.corpus.samples.kind_of`), or "texts" for texts of a language model that come one by one."""
    source: str
    tokens: int
    items: int
    columns: tuple[str, ...]
    context: int | None
    seed: int

    @classmethod
    def resolve(
        cls, opened: Source, request: CalibrationRequest, recorded: Mapping[str, str] | None = None
    ) -> "CalibrationConfig":
        """Fill in what the request leaves open: from `recorded` (the metadata of statistics or a plan), or by defaults.

        The seed of recorded data is kept: the same text serves folds of any seed.

        Raises:
            UserError: a model that cannot write its own calibration text has no data named; a number is below its least.
        """
        for name, least in _LEAST.items():
            if (number := getattr(request, name)) is not None and number < least:
                raise UserError(
                    f"{name}: expected a whole number from {least} on, got {number}; choose another, or leave it out"
                )
        if request.source is None and (earlier := CalibrationRequest.recorded(recorded or {})):
            request = request.with_data_of(earlier)
        kind = request.kind or kind_of(opened.config, request.columns)
        if request.source is None and kind != "text":
            raise UserError(
                f"{opened.name}: calibration needs {_KINDS_IN_WORDS[kind]}, and only a "
                "language model can write its own; pass --calibration SOURCE"
            )
        return cls(
            kind,
            DEFAULT_SOURCE if request.source is None else request.source,
            request.tokens or DEFAULT_TOKENS,
            request.items or DEFAULT_ITEMS.get(kind, 0),
            request.columns,
            request.context,
            request.seed,
        )

    @property
    def is_written(self) -> bool:
        """Whether there is no more of the data than what was drawn: the model wrote them, or a program gave them."""
        return self.source == DEFAULT_SOURCE or self.source.startswith(FROM_PYTHON)

    def facts(self, sample: Mapping[str, Tensor]) -> dict[str, str]:
        """Return what describes the data in files and cards: enough to draw the same again."""
        first = main_input(sample)
        amount = first.numel() if self.kind == "text" else len(first)
        length = {"context": str(first.shape[1])} if first.ndim == 2 and not first.is_floating_point() else {}
        columns = {"columns": ",".join(self.columns)} if self.columns else {}
        named = {"kind": self.kind, "source": self.source, "tokens": str(amount), "seed": str(self.seed)}
        return {**named, **length, **columns, "fingerprint": fingerprint(sample)}
