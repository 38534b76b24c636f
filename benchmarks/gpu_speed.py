"""The sections of `gpu.py` that time decoding: attention alone, and `generate`."""

import importlib.util
import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from types import SimpleNamespace
from typing import Any

import torch
from gpu_setup import SEED, Record, Setup, relative_error, timed_calls
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import headfold

NEW_TOKENS, ROUNDS = 24, 2
TRIAL_LAYERS = 2


@dataclass(frozen=True, slots=True)
class Shapes:
    """The shapes of decode attention of one model: every count of K/V heads with every length and batch."""

    model: str
    num_heads: int
    head_dim: int
    num_kv_heads: tuple[int, ...]
    keys: tuple[int, ...]
    batches: tuple[int, ...]
    scaling: float


SHAPES = (
    Shapes("llama-2-7b", 32, 128, (32, 8, 4, 1), (4096, 32768), (1, 16), 128**-0.5),
    Shapes("t5-xxl cross", 64, 64, (64, 8, 1), (512, 4096), (1, 16), 1.0),
)
TINY = (
    Shapes("llama-2-7b", 4, 16, (4, 1), (64,), (1,), 0.25),
    Shapes("t5-xxl cross", 4, 8, (2,), (32,), (2,), 1.0),
)


def variants(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float
) -> dict[str, Callable[[], Tensor]]:
    """Return attention functions by name, each giving (batch, 1, head, dim). `packed` ones are the candidates of headfold."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as registered

    (batch, heads, _, dim), groups = query.shape, key.shape[1]
    module = SimpleNamespace(num_key_value_groups=heads // groups, is_causal=True, training=False)
    rows = query.reshape(batch, groups, heads // groups, dim)

    def stock(name: str) -> Callable[[], Tensor]:
        return lambda: registered[name](module, query, key, value, mask, scaling=scale, dropout=0.0)[0]

    def repeated() -> Tensor:
        k, v = (t.repeat_interleave(heads // groups, 1) for t in (key, value))
        return scaled_dot_product_attention(query, k, v, attn_mask=mask, scale=scale).transpose(1, 2)

    def grouped() -> Tensor:
        return scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale, enable_gqa=True).transpose(
            1, 2
        )

    def packed_sdpa() -> Tensor:
        return scaled_dot_product_attention(rows, key, value, attn_mask=mask, scale=scale).reshape(batch, 1, heads, dim)

    def packed_matmuls() -> Tensor:
        logits = (rows @ key.mT).float() * scale
        logits = logits if mask is None else logits.masked_fill(~mask, torch.finfo(torch.float32).min)
        return (logits.softmax(-1).to(value.dtype) @ value).reshape(batch, 1, heads, dim)

    found = {
        "headfold": stock("headfold"), "stock sdpa": stock("sdpa"), "sdpa, repeated heads": repeated, "sdpa, enable_gqa": grouped,
        "packed sdpa": packed_sdpa, "packed matmuls": packed_matmuls,
    }  # fmt: skip
    if query.device.type == "cuda" and mask is None and importlib.util.find_spec("flash_attn") is not None:
        import flash_attn

        q, k, v = (t.transpose(1, 2) for t in (query, key, value))
        found["flash_attn"] = lambda: flash_attn.flash_attn_func(q, k, v, softmax_scale=scale)
        found["flash_attn, split keys"] = lambda: flash_attn.flash_attn_with_kvcache(q, k, v, softmax_scale=scale)
    return found


class Lines(logging.Handler):
    """Appends the messages of a log to a list."""

    def __init__(self, lines: list[str]) -> None:
        super().__init__()
        self.lines = lines

    def emit(self, record: logging.LogRecord) -> None:
        """Append the message of a record."""
        self.lines.append(record.getMessage())


@contextmanager
def choices() -> Iterator[list[str]]:
    """Return a context with the lines in which headfold logs how long its candidates took on a class of shapes."""
    lines: list[str] = []
    handler, log = Lines(lines), logging.getLogger("headfold")
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.DEBUG)
    try:
        yield lines
    finally:
        log.removeHandler(handler)
        log.setLevel(level)


def chosen(lines: list[str], groups: int, rows: int, *, masked: bool) -> dict[str, str]:
    """Return the candidate of a class of shapes and the line that says why: of one class, the longest keys, which are logged last."""
    for line in reversed(lines):
        found = re.search(r"(\d+) groups × (\d+) rows × \d+ keys[^:]*: (\w+) ", line)
        if found and (int(found[1]), int(found[2]), ", masked:" in line) == (_class(groups), _class(rows), masked):
            return {"candidate": found[3], "timed": line}
    return {"candidate": "not timed", "timed": ""}


def _class(size: int) -> int:
    return 1 << max(0, size - 1).bit_length()


def kernels(run: Callable[[], Any]) -> list[str]:
    """Return the names of the GPU kernels of one call."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    return [event.key[:100] for event in profile.key_averages() if not event.key.startswith(("cuda", "Activity"))]


@torch.no_grad()
def attention_row(
    setup: Setup, lines: list[str], of: Shapes, kv: int, keys: int, batch: int, *, masked: bool
) -> dict[str, Any]:
    """Time every variant on one shape."""
    draw = torch.Generator(setup.device).manual_seed(SEED)
    sizes = ((of.num_heads, 1), (kv, keys), (kv, keys))
    query, key, value = (
        torch.randn(batch, *size, of.head_dim, generator=draw, device=setup.device, dtype=torch.bfloat16)
        for size in sizes
    )
    mask = torch.ones(batch, 1, 1, keys, dtype=torch.bool, device=setup.device) if masked else None
    if mask is not None:
        mask[::2, ..., : keys // 8] = False
    k, v = (t[:1].float().repeat_interleave(of.num_heads // kv, 1) for t in (key, value))
    first = None if mask is None else mask[:1]
    expected = scaled_dot_product_attention(query[:1].float(), k, v, attn_mask=first, scale=of.scaling).transpose(1, 2)
    del k, v
    rows: dict[str, Any] = {}
    for name, run in variants(query, key, value, mask, of.scaling).items():
        try:
            timing = timed_calls(run, setup, 0.02 if setup.dry_run else 0.25)
            timing["bytes_per_second"] = 2 * key.nbytes / timing["seconds"]
            timing["relative_error"] = relative_error(run()[:1], expected)
            rows[name] = timing | ({"kernels": kernels(run)} if setup.on_gpu else {})
        except Exception as error:  # out of memory, or a shape that a kernel does not take
            rows[name] = {"error": " ".join(f"{type(error).__name__}: {error}".split())[:300]}
    return {
        "model": of.model, "batch": batch, "num_heads": of.num_heads, "num_kv_heads": kv, "head_dim": of.head_dim, "keys": keys,
        "padded": masked, "kv_bytes": 2 * key.nbytes,
        "chosen": chosen(lines, batch * kv, of.num_heads // kv, masked=masked), "variants": rows,
    }  # fmt: skip


def decode_attention(setup: Setup, record: Record) -> None:
    """Time the attention of one new token in bfloat16, by headfold, stock transformers, torch and FlashAttention where installed."""
    record.put(dtype="bfloat16", flush_bytes=0 if not setup.on_gpu else 1 << 29)
    for of in TINY if setup.dry_run else SHAPES:
        with choices() as lines:
            for keys, kv, batch in product(of.keys, of.num_kv_heads, of.batches):
                for masked in (False, True) if kv in (8, 2) and batch > 1 else (False,):
                    name = f"{of.model}, batch {batch}, {kv} K/V heads, {keys} keys{', padded' if masked else ''}"
                    record.row("rows", name, lambda: attention_row(setup, lines, of, kv, keys, batch, masked=masked), 3)  # noqa: B023


def generate(setup: Setup, record: Record) -> None:
    """Time `generate` of random models of published shapes, headfold against stock sdpa, with as many layers as fit the time."""
    flash = setup.on_gpu and importlib.util.find_spec("flash_attn") is not None
    plans: tuple[tuple[str, tuple[int, ...], int, int], ...] = (
        ("llama-2-7b", (32, 8, 1), 4096, 32), ("t5-xxl", (64, 8, 1), 2048, 24),
    )  # fmt: skip
    if setup.dry_run:
        plans = (("attention", (4,), 16, 1),)
    for number, (shape, counts, context, layers) in enumerate(plans):
        share = record.left() / (len(plans) - number)
        attentions = ("headfold", "sdpa", *(("flash_attention_2",) if flash and shape.startswith("llama") else ()))

        def run(
            depth: int, shape: str = shape, counts: tuple[int, ...] = counts, context: int = context, layers: int = layers,
            attentions: tuple[str, ...] = attentions,
        ) -> dict[str, Any]:  # fmt: skip
            made = headfold.bench(
                shape=shape, kv_heads=counts, layers=depth, contexts=(context,), batches=(1,) if setup.dry_run else (1, 8),
                dtype="bfloat16", skip_prefill=True, new_tokens=3 if setup.dry_run else NEW_TOKENS,
                rounds=1 if setup.dry_run else ROUNDS, attentions=attentions, device=setup.device,
            )  # fmt: skip
            return {"layers": depth, "full_layers": layers, **made.to_json()}

        before = record.left()
        trial = record.row("rows", f"{shape}, trial", lambda: run(min(TRIAL_LAYERS, layers)), 5)  # noqa: B023
        if trial is None or layers <= TRIAL_LAYERS:
            continue
        spent = before - record.left()
        tokens = sum(row["first_token"] + row["per_token"] * NEW_TOKENS for row in trial["rows"]) * (ROUNDS + 1)
        # What is not new tokens (models, choices of kernels, warm-up) does not grow as fast as the layers; assume half as fast.
        per_layer = (tokens + max(0.0, spent - tokens) / 2) / TRIAL_LAYERS
        depth = max((n for n in (4, 8, 16, layers) if spent + per_layer * n < 0.9 * (share - spent)), default=4)
        record.row("rows", shape, lambda: run(depth), spent + per_layer * (depth - TRIAL_LAYERS))  # noqa: B023
