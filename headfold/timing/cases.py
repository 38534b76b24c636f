"""The cases of a benchmark: models under attention implementations, in settings, timed in turns inside one run."""

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..checkpoint.hub import resolve
from ..checkpoint.refusals import NO_CODE
from ..core.errors import UserError
from ..families.context import context_length
from ..hf_models import available_memory, compute_dtype, speeds
from ..runtime.attention import NAME
from ..runtime.cache import generate_in_place
from ..runtime.load import load, read_checked_config, refuse_code, takes_attention
from .breakdown import breakdown, weights_read, write_trace
from .generation import Setting, Timing, cache_bytes, generate
from .shapes import random_model, shape_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ATTENTIONS = (NAME, "sdpa")
IN_PLACE = " in place"
COPIES = 2.2
"""Caches that lie in memory at once, at most: stock ones are copied when they grow."""
UNLIMITED = 1 << 30


@dataclass(frozen=True, slots=True)
class BenchRow:
    """One model under one attention implementation in one setting. Times are medians over rounds, in seconds; sizes in bytes."""

    model: str
    attention: str
    """`headfold` and names that end in ` in place` use caches that grow in place, others stock caches."""
    num_kv_heads: tuple[int, ...]
    """The distinct counts among its decoder's sites."""
    context: int
    batch: int
    first_token: float
    """Time from the call to the first token, which includes reading the prompt."""
    per_token: float
    """Time of each further token of the whole batch."""
    per_token_quartiles: tuple[float, float]
    per_sample: float
    """Time of the whole call, divided by the batch."""
    tokens_per_second: float
    kv_bytes: int
    weight_bytes: int
    """Bytes of the linear layers that a new token runs through."""
    peak_bytes: int | None
    """Most memory taken beyond the weights."""
    bytes_per_second: float
    """Weights and cache read for a token, divided by its time."""
    parts: dict[str, float] | None = None
    """Seconds of a new token by part (`timing.breakdown.PARTS`)."""


@dataclass(frozen=True, slots=True)
class BenchResult:
    """All rows of a run, and what they were measured on. `paths` says which decoding kernel ran, and why."""

    rows: list[BenchRow]
    dtype: str
    device: str
    threads: int
    flags: list[str]
    read_bandwidth: float
    """Bytes per second that this machine reads."""
    new_tokens: int
    rounds: int
    padded: bool
    skip_prefill: bool
    paths: list[str]
    notes: list[str]

    def to_json(self) -> dict[str, Any]:
        """Return the machine-readable form, as --json prints it."""
        return asdict(self)


@dataclass(slots=True)
class BenchModel:
    """A model to time, with what was measured of it so far."""

    label: str
    model: "PreTrainedModel"
    attentions: tuple[str, ...]
    weight_bytes: int = 0
    timings: dict[str, list[Timing]] = field(default_factory=dict)
    parts: dict[str, dict[str, float]] = field(default_factory=dict)


def opened_models(
    models: Sequence[str | Path], attentions: Sequence[str], dtype: torch.dtype | None, device: str
) -> list[BenchModel]:
    """Open checkpoints, folded or not, as `headfold.load` does.

    Raises:
        UserError: a checkpoint that does not open, or a model that does not write text from text.
    """
    opened = [_opened(str(model), attentions, dtype, device) for model in models]
    _shorten(opened)
    return opened


def _opened(name: str, attentions: Sequence[str], dtype: torch.dtype | None, device: str) -> BenchModel:
    options: dict[str, Any] = {} if dtype is None else {"dtype": dtype}
    directory = resolve(name)
    refuse_code(read_checked_config(directory), directory, NO_CODE)
    model: Any = load(directory, **options)
    model = model.to(device)
    _require_text(name, model)
    return BenchModel(name.rstrip("/"), model, _attentions(model, attentions))


def _require_text(name: str, model: "PreTrainedModel") -> None:
    if not model.can_generate() or model.main_input_name != "input_ids":
        raise UserError(
            f"{name}: expected a model that writes text from text, got {type(model).__name__}; bench times new tokens"
        )


def _shorten(cases: Sequence[BenchModel]) -> None:
    """Shorten labels to as few parts of the path as tell the models apart."""
    paths = {case.label: Path(case.label).parts for case in cases}
    for case in cases:
        parts = paths[case.label]
        for length in range(1, len(parts) + 1):
            same = [label for label, other in paths.items() if other[-length:] == parts[-length:]]
            if len(same) == 1:
                break
        case.label = str(Path(*parts[-length:]))


def random_models(
    shape: str | None,
    kv_heads: Sequence[int],
    layers: int | None,
    attentions: Sequence[str],
    dtype: torch.dtype,
    device: str,
) -> Iterator[BenchModel]:
    """Yield random models of a shape, one per count of K/V heads; weights that they share lie in memory once.

    Raises:
        UserError: an unknown shape, or options of random models without a shape.
    """
    if shape is None:
        if kv_heads or layers is not None:
            option = "--kv-heads" if kv_heads else "--layers"
            raise UserError(
                f"bench: {option} is for random models; give --shape NAME, or a checkpoint directory as --shape"
            )
        return
    config, like = shape_config(shape, layers=layers), None
    name = Path(shape).name if layers is None else f"{Path(shape).name}, {layers} layers"
    own: list[int | None] = [None]
    for count in kv_heads or own:
        model = random_model(config, count, dtype=dtype, device=device, like=like, where=shape)
        like = like or model
        _require_text(shape, model)
        yield BenchModel(name, model, _attentions(model, attentions))


def _attentions(model: "PreTrainedModel", requested: Sequence[str]) -> tuple[str, ...]:
    """Return the requested attentions where the class takes one by name, else its own with headfold's caches and with stock ones.

    Where a class has no sdpa (soft-capped logits, sinks), stock transformers runs eager.
    """
    own = model.config._attn_implementation
    if not takes_attention(model):
        return own + IN_PLACE, own
    return tuple("eager" if name == "sdpa" and not model._supports_sdpa else name for name in requested)


def longest_context(model: "PreTrainedModel") -> int:
    """Return the tokens that the model has positions for; `UNLIMITED` where they are relative."""
    return context_length(model.config.get_text_config(decoder=True).to_dict()) or UNLIMITED


def check_settings(cases: Sequence[BenchModel], settings: Sequence[Setting], device: str) -> None:
    """Refuse settings that would fail on the way.

    Raises:
        UserError: a context that is too long for a model, or a cache that is too large for the machine.
    """
    for case in cases:
        for setting in settings:
            length, longest = setting.context + setting.new_tokens, longest_context(case.model)
            if length > longest:
                raise UserError(
                    f"{case.label}: expected at most {longest} tokens, got {setting.context} of context and "
                    f"{setting.new_tokens} new ones; choose a smaller --context"
                )
            needed, free = COPIES * cache_bytes(case.model, setting), available_memory(device)
            if needed > free:
                raise UserError(
                    f"{case.label}: {setting.context} tokens of context for {setting.batch} samples take about {needed / 1e9:.1f} GB "
                    f"of memory, of which {free / 1e9:.1f} GB are free; choose a smaller --context or --batch"
                )


def run_round(cases: Sequence[BenchModel], setting: Setting, number: int, profile: Path | None) -> None:
    """Generate once with every model and attention. Round 0 warms up, counts weights and with `profile` records where time goes."""
    pairs = [(case, name) for case in cases for name in case.attentions]
    start = number % len(pairs)
    for case, name in pairs[start:] + pairs[:start]:
        _use(case, name)
        grows = _grows(name)
        if number:
            case.timings[name].append(generate(case.model, setting, grows=grows))
            continue
        case.timings[name] = []
        warm = generate(case.model, setting, grows=grows)
        case.weight_bytes = case.weight_bytes or weights_read(case.model, setting, grows=grows)
        if profile is not None:
            case.parts[name] = breakdown(case.model, setting, grows=grows)
            heads = "-".join(map(str, sorted(set(warm.num_kv_heads))))
            label = f"{case.label} {heads} heads {name} {setting.context} x {setting.batch}"
            write_trace(
                profile / f"{label.replace(', ', '-').replace(' ', '-').replace('/', '-')}.json",
                case.model,
                setting,
                grows=grows,
            )


def _grows(attention: str) -> bool:
    """Return whether the attention is timed with caches that grow in place."""
    return attention == NAME or attention.endswith(IN_PLACE)


def _use(case: BenchModel, name: str) -> None:
    """Set the model to decode under an attention implementation, with the caches that belong to it."""
    model, grows = case.model, _grows(name)
    name = name.removesuffix(IN_PLACE)
    if model.config._attn_implementation != name:
        try:
            model.set_attn_implementation(name)
        except (ImportError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(f"{case.label}: attention {name}: {reason}; choose another --attention") from error
    vars(model).pop("_prepare_cache_for_generation", None)
    if grows:
        generate_in_place(model)


def bench_row(case: BenchModel, name: str, setting: Setting) -> BenchRow:
    """Return the medians of the timings of one model under one attention implementation."""
    timings = case.timings[name]
    tokens = sorted(token for timing in timings for token in timing.tokens)
    per_token = statistics.median(tokens)
    peaks = [timing.peak_bytes for timing in timings if timing.peak_bytes is not None]
    kv_bytes = timings[0].kv_bytes
    return BenchRow(
        model=case.label,
        attention=name,
        num_kv_heads=tuple(sorted(set(timings[0].num_kv_heads))),
        context=setting.context,
        batch=setting.batch,
        first_token=statistics.median(timing.first for timing in timings),
        per_token=per_token,
        per_token_quartiles=(tokens[len(tokens) // 4], tokens[3 * len(tokens) // 4]),
        per_sample=statistics.median(timing.first + sum(timing.tokens) for timing in timings) / setting.batch,
        tokens_per_second=setting.batch / per_token,
        kv_bytes=kv_bytes,
        weight_bytes=case.weight_bytes,
        peak_bytes=max(peaks) if peaks else None,
        bytes_per_second=(kv_bytes + case.weight_bytes) / per_token,
        parts=case.parts.get(name),
    )


def notes_on(cases: Sequence[BenchModel], device: str) -> list[str]:
    """Return notes on what a user might take for a fault of the fold."""
    notes = [
        f"{case.label}: its class takes no attention by name; timed under its own, {case.attentions[-1]}"
        for case in cases
        if not takes_attention(case.model)
    ]
    for case in cases:
        if any(".experts." in name and tensor.dim() > 2 for name, tensor in case.model.named_parameters()):
            notes.append(f"{case.label}: experts are not counted among the weights that a token reads")
        if any(getattr(module, "kv_of_query", None) for module in case.model.modules()):
            notes.append(f"{case.label}: unequal groups, so any name but eager stands for headfold's attention")
    for dtype in {case.model.dtype for case in cases}:
        faster, _ = compute_dtype(dtype, device)
        if faster != dtype:
            name = str(faster).removeprefix("torch.")
            notes.append(f"prompts are read faster with --dtype {name}: {speeds(dtype)}")
    return notes
