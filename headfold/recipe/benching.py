"""Time decoding: several models, attentions, contexts and batches, in turns inside one run."""

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..checkpoint.hub import resolve
from ..core.errors import UserError
from ..hf_models import available_memory, compute_dtype, processor_flags
from ..runtime.attention import NAME
from ..runtime.cache import generate_in_place
from ..runtime.decoding import TRIALS, fastest
from ..runtime.load import load, takes_attention
from ..timing.breakdown import breakdown, weights_read, write_trace
from ..timing.generation import Setting, Timing, cache_bytes, generate
from ..timing.machine import read_bandwidth
from ..timing.shapes import random_model, shape_config
from .measuring import default_device
from .source import Progress, silent

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CONTEXT, BATCH, NEW_TOKENS, ROUNDS = 2048, 4, 32, 5
ATTENTIONS = (NAME, "sdpa")
IN_PLACE = " in place"
DTYPES = ("bfloat16", "float16", "float32", "float64")
SHORT = 64
"""Keys below which a choice of ours does not matter, nor is told."""
COPIES = 2.2
"""Caches that lie in memory at once, at most: stock ones are copied when they grow."""


@dataclass(frozen=True, slots=True)
class Row:
    """One model under one attention in one setting. Times are medians over rounds, in seconds; sizes in bytes."""

    model: str
    attention: str
    """`headfold`, and any name with ` in place` behind it, with caches that grow in place; others with stock's."""
    kv_heads: tuple[int, ...]
    """The different counts of its decoder's sites."""
    context: int
    batch: int
    first_token: float
    """From the call to the first token, that is with reading the prompt."""
    per_token: float
    """Of each further token, of the whole batch."""
    per_token_quartiles: tuple[float, float]
    per_sample: float
    """The whole call, divided by the batch."""
    tokens_per_second: float
    kv_bytes: int
    weight_bytes: int
    """Of the linear layers that a new token runs through."""
    peak_bytes: int | None
    """Memory beyond the weights, at most."""
    bytes_per_second: float
    """Weights and cache read for a token, by the time that it takes."""
    parts: dict[str, float] | None = None
    """Seconds of a new token by where they go (`timing.breakdown.PARTS`)."""


@dataclass(frozen=True, slots=True)
class Bench:
    """All rows of a run, and what they were measured on. `paths` says which way of decoding ran, and why."""

    rows: list[Row]
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
        return asdict(self)


@dataclass(slots=True)
class _Subject:
    """A model and what is known of it."""

    label: str
    model: "PreTrainedModel"
    attentions: tuple[str, ...]
    weight_bytes: int = 0
    timings: dict[str, list[Timing]] = field(default_factory=dict)
    parts: dict[str, dict[str, float]] = field(default_factory=dict)


def bench(
    models: Sequence[str | Path] = (),
    *,
    shape: str | None = None,
    kv_heads: Sequence[int] = (),
    layers: int | None = None,
    attentions: Sequence[str] = ATTENTIONS,
    contexts: Sequence[int] = (),
    batches: Sequence[int] = (BATCH,),
    new_tokens: int = NEW_TOKENS,
    rounds: int = ROUNDS,
    dtype: str | None = None,
    padded: bool = False,
    skip_prefill: bool = False,
    profile: Path | None = None,
    device: str | None = None,
    progress: Progress | None = None,
) -> Bench:
    """Time a new token, and a whole sample, of checkpoints or of random models of a shape.

    `shape` is a name of `timing.shapes.SHAPES` or a checkpoint directory, cut to `layers` and built with each of `kv_heads` (default:
    its own count). Every model runs under each of `attentions`: `headfold` is ours, with caches that grow in place, any other stock
    transformers'. All of a setting run in turns, the first round not counted. `contexts` defaults to 2,048 tokens or what the model
    takes. `padded` and `skip_prefill` are those of `timing.generation.Setting`. `profile`, a directory, gets a trace of each, and the rows
    say where time goes.

    Raises:
        UserError: nothing to time, a model that does not generate, or a setting that it or this machine cannot hold.
    """
    progress, device = progress or silent, device or default_device()
    kind = _dtype(dtype)
    subjects = [
        *_opened_all(models, attentions, kind, device),
        *_built(shape, kv_heads, layers, attentions, kind or torch.bfloat16, device),
    ]
    if not subjects:
        raise UserError("bench: expected a MODEL or --shape NAME, got neither; name what to time")
    contexts = contexts or (max(1, min(CONTEXT, *(_longest(subject.model) - new_tokens for subject in subjects))),)
    settings = [Setting(c, b, new_tokens, padded, skip_prefill) for c, b in product(contexts, batches)]
    _check(subjects, settings, device)
    fastest.cache_clear()  # what this run decides is measured in it, and told
    first_trial = len(TRIALS)
    rows: list[Row] = []
    for number, setting in enumerate(settings):
        step = number * (rounds + 1)
        for round_number in range(rounds + 1):
            progress("bench", step + round_number, len(settings) * (rounds + 1))
            _round(subjects, setting, round_number, profile)
        rows += [_row(subject, name, setting) for subject in subjects for name in subject.attentions]
    progress("bench", 1, 1)
    types = {str(subject.model.dtype).removeprefix("torch.") for subject in subjects}
    return Bench(
        rows=rows,
        dtype=", ".join(sorted(types)),
        device=torch.cuda.get_device_name() if device == "cuda" else device,
        threads=torch.get_num_threads(),
        flags=sorted(flag for flag in processor_flags() if flag.startswith(("avx", "amx", "sve", "bf16", "fma", "f16c"))),
        read_bandwidth=read_bandwidth(device),
        new_tokens=new_tokens,
        rounds=rounds,
        padded=padded,
        skip_prefill=skip_prefill,
        paths=[str(trial) for trial in TRIALS[first_trial:] if trial.keys >= SHORT],
        notes=_notes(subjects, device),
    )  # fmt: skip


def _dtype(name: str | None) -> torch.dtype | None:
    if name not in (None, *DTYPES):
        raise UserError(f"bench: --dtype: expected one of {', '.join(DTYPES)}, got {name}")
    return None if name is None else getattr(torch, name)


def _opened_all(
    models: Sequence[str | Path], attentions: Sequence[str], dtype: torch.dtype | None, device: str
) -> list[_Subject]:
    opened = [_opened(str(model), attentions, dtype, device) for model in models]
    _shorten(opened)
    return opened


def _opened(name: str, attentions: Sequence[str], dtype: torch.dtype | None, device: str) -> _Subject:
    """A checkpoint, folded or not, as `headfold.load` opens it."""
    model = load(resolve(name), **({} if dtype is None else {"dtype": dtype})).to(device)
    _require_text(name, model)
    return _Subject(name.rstrip("/"), model, _attentions(model, attentions))


def _require_text(name: str, model: "PreTrainedModel") -> None:
    if not model.can_generate() or model.main_input_name != "input_ids":
        raise UserError(
            f"{name}: expected a model that writes text from text, got {type(model).__name__}; bench times new tokens"
        )


def _shorten(subjects: Sequence[_Subject]) -> None:
    """Labels of as few parts of a path as tell the models apart."""
    paths = {subject.label: Path(subject.label).parts for subject in subjects}
    for subject in subjects:
        parts = paths[subject.label]
        for length in range(1, len(parts) + 1):
            same = [label for label, other in paths.items() if other[-length:] == parts[-length:]]
            if len(same) == 1:
                break
        subject.label = str(Path(*parts[-length:]))


def _built(
    shape: str | None,
    kv_heads: Sequence[int],
    layers: int | None,
    attentions: Sequence[str],
    dtype: torch.dtype,
    device: str,
) -> Iterator[_Subject]:
    """Random models of a shape, one per count of K/V heads; what they have in common lies in memory once."""
    if shape is None:
        if kv_heads or layers is not None:
            option = "--kv-heads" if kv_heads else "--layers"
            raise UserError(
                f"bench: {option} is for random models; give --shape NAME, or a checkpoint directory as --shape"
            )
        return
    config, like = shape_config(shape, layers=layers), None
    name = Path(shape).name if layers is None else f"{Path(shape).name}, {layers} layers"
    for count in kv_heads or [None]:
        model = random_model(config, count, dtype=dtype, device=device, like=like, where=shape)
        like = like or model
        _require_text(shape, model)
        yield _Subject(name, model, _attentions(model, attentions))


def _attentions(model: "PreTrainedModel", asked: Sequence[str]) -> tuple[str, ...]:
    """Those asked for, where the class takes an attention by name; else its own one, with our caches and with stock ones.

    Where a class has no sdpa (soft-capped logits, sinks), eager is what stock transformers runs.
    """
    own = model.config._attn_implementation
    if not takes_attention(model):
        return own + IN_PLACE, own
    return tuple("eager" if name == "sdpa" and not model._supports_sdpa else name for name in asked)


def _longest(model: "PreTrainedModel") -> int:
    """Tokens that the model has positions for; without end where they are relative."""
    config = model.config.get_text_config(decoder=True)
    limits = [
        getattr(config, name, None) for name in ("max_position_embeddings", "n_positions", "max_target_positions")
    ]
    limits = [] if config.model_type in ("t5", "mt5", "umt5") else limits
    return min((limit for limit in limits if isinstance(limit, int)), default=1 << 30)


def _check(subjects: Sequence[_Subject], settings: Sequence[Setting], device: str) -> None:
    """Refuse what would end in the middle: a context too long, a cache too large."""
    for subject in subjects:
        for setting in settings:
            length, longest = setting.context + setting.new_tokens, _longest(subject.model)
            if length > longest:
                raise UserError(
                    f"{subject.label}: expected at most {longest} tokens, got {setting.context} of context and "
                    f"{setting.new_tokens} new ones; choose a smaller --context"
                )
            needed, free = COPIES * cache_bytes(subject.model, setting), available_memory(device)
            if needed > free:
                raise UserError(
                    f"{subject.label}: {setting.context} tokens of context for {setting.batch} samples take about {needed / 1e9:.1f} GB "
                    f"of memory, of which {free / 1e9:.1f} GB are free; choose a smaller --context or --batch"
                )


def _round(subjects: Sequence[_Subject], setting: Setting, number: int, profile: Path | None) -> None:
    """One generation of every case. The first round warms up, counts weights and, if asked, looks where time goes."""
    cases = [(subject, name) for subject in subjects for name in subject.attentions]
    start = number % len(cases)
    for subject, name in cases[start:] + cases[:start]:
        _use(subject, name)
        grows = _grows(name)
        if number:
            subject.timings[name].append(generate(subject.model, setting, grows=grows))
            continue
        subject.timings[name] = []
        warm = generate(subject.model, setting, grows=grows)
        subject.weight_bytes = subject.weight_bytes or weights_read(subject.model, setting, grows=grows)
        if profile is not None:
            subject.parts[name] = breakdown(subject.model, setting, grows=grows)
            heads = "-".join(map(str, sorted(set(warm.kv_heads))))
            label = f"{subject.label} {heads} heads {name} {setting.context} x {setting.batch}"
            write_trace(
                profile / f"{label.replace(', ', '-').replace(' ', '-').replace('/', '-')}.json",
                subject.model,
                setting,
                grows=grows,
            )


def _grows(attention: str) -> bool:
    """Whether a case has our caches."""
    return attention == NAME or attention.endswith(IN_PLACE)


def _use(subject: _Subject, name: str) -> None:
    """Let the model decode under an attention: ours with our caches, others with stock ones."""
    model, grows = subject.model, _grows(name)
    name = name.removesuffix(IN_PLACE)
    if model.config._attn_implementation != name:
        try:
            model.set_attn_implementation(name)
        except (ImportError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(f"{subject.label}: attention {name}: {reason}; choose another --attention") from error
    vars(model).pop("_prepare_cache_for_generation", None)
    if grows:
        generate_in_place(model)


def _row(subject: _Subject, name: str, setting: Setting) -> Row:
    timings = subject.timings[name]
    tokens = sorted(token for timing in timings for token in timing.tokens)
    per_token = statistics.median(tokens)
    peaks = [timing.peak_bytes for timing in timings if timing.peak_bytes is not None]
    kv_bytes = timings[0].kv_bytes
    return Row(
        model=subject.label,
        attention=name,
        kv_heads=tuple(sorted(set(timings[0].kv_heads))),
        context=setting.context,
        batch=setting.batch,
        first_token=statistics.median(timing.first for timing in timings),
        per_token=per_token,
        per_token_quartiles=(tokens[len(tokens) // 4], tokens[3 * len(tokens) // 4]),
        per_sample=statistics.median(timing.first + sum(timing.tokens) for timing in timings) / setting.batch,
        tokens_per_second=setting.batch / per_token,
        kv_bytes=kv_bytes,
        weight_bytes=subject.weight_bytes,
        peak_bytes=max(peaks) if peaks else None,
        bytes_per_second=(kv_bytes + subject.weight_bytes) / per_token,
        parts=subject.parts.get(name),
    )


def _notes(subjects: Sequence[_Subject], device: str) -> list[str]:
    """What a user might take for a fault of the fold."""
    notes = [
        f"{subject.label}: its class takes no attention by name; timed under its own, {subject.attentions[-1]}"
        for subject in subjects
        if not takes_attention(subject.model)
    ]
    for subject in subjects:
        if any(parameter.dim() > 2 for parameter in subject.model.parameters()):
            notes.append(f"{subject.label}: experts are not counted among the weights that a token reads")
        if any(getattr(module, "kv_of_query", None) for module in subject.model.modules()):
            notes.append(f"{subject.label}: unequal groups, so any name but eager stands for headfold's attention")
    for dtype in {subject.model.dtype for subject in subjects}:
        faster, why = compute_dtype(dtype, device)
        if faster != dtype:
            notes.append(f"reading a prompt would be faster in {str(faster).removeprefix('torch.')} (--dtype): {why}")
    return notes
