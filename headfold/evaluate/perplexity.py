"""Loss and perplexity of a language model on a text, alone or beside the model it was folded from."""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import kl_div

from ..checkpoint.config import read_config
from ..checkpoint.reader import Checkpoint
from ..core.errors import UserError
from ..core.progress import Progress, counter, no_progress
from ..corpus import open_corpus
from ..corpus.rows import Table
from ..corpus.samples import NamedSample
from ..corpus.windows import token_stream
from ..families.cached import stored_kv_bytes_per_token
from ..families.context import context_length
from ..hf_models import compute_dtype, open_model, open_tokenizer, stored_dtype
from ..hf_models.streamed import input_device
from ..metrics.bootstrap import Units
from ..parallel import on_main, run_shared
from ..runtime.load import own_class

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

MAX_CONTEXT = 2048
"""Default window where the model's context is longer."""

NUM_BINS = 16
"""Number of equal bins of position in the window that the loss is reported for."""

LOGIT_BUDGET = 2**27
"""Number of logits held at once per model, which determines the default batch."""

CHUNK = 2**18
"""Number of logits normalised at once, so that they stay in the processor's cache."""

HELDOUT = "the bundled held-out text"
Windows = Int[Tensor, "window context"] | Sequence[Int[Tensor, " _position"]]
"""Windows of one length, or of several (an axis that begins with _ may differ from item to item)."""


def _exp(nll: float) -> float:
    """Return the perplexity of a loss; infinity where no float is as large."""
    try:
        return math.exp(nll)
    except OverflowError:
        return math.inf


@dataclass(frozen=True, slots=True)
class LossComparison:
    """Losses in nats per token over all predicted tokens; the `reference` fields, `kl` and `top1_agreement` are None without a
    reference.

    `kl` is the mean KL(reference ‖ model), `top1_agreement` the share of positions where both rank the same token first.
    `nll_by_position` is the mean loss in equal bins of position in the window, NaN where a bin is empty.
    """

    num_tokens: int
    nll: float
    nll_by_position: tuple[float, ...]
    seconds: float
    reference_nll: float | None = None
    reference_nll_by_position: tuple[float, ...] | None = None
    kl: float | None = None
    top1_agreement: float | None = None

    @property
    def perplexity(self) -> float:
        return _exp(self.nll)

    @property
    def reference_perplexity(self) -> float | None:
        return None if self.reference_nll is None else _exp(self.reference_nll)


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation(LossComparison):
    """A loss comparison with the models and data it is about. K/V bytes are those of one token, over all layers, in the checkpoint's
    own dtype.
    """

    model: str
    reference: str | None
    text: str
    context: int
    num_windows: int
    dtype: str
    kv_bytes_per_token: int
    reference_kv_bytes_per_token: int | None = None


def evaluate_perplexity(
    model_dir: str | Path,
    reference_dir: str | Path | None = None,
    text: str | Table | NamedSample | None = None,
    *,
    context: int | None = None,
    batch_size: int | None = None,
    max_tokens: int | None = None,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    progress: Progress = no_progress,
) -> Evaluation:
    """Measure a checkpoint on the whole of a text, in order, in one pass together with its reference.

    `text` is any source of `headfold.corpus`, rows of text, or tokens (default: the bundled held-out text). Windows of `context`
    tokens (default: the model's own, at most `MAX_CONTEXT`) do not overlap; the last may be shorter. `max_tokens` stops early.
    `dtype` is what both models compute in (default: `compute_dtype` of the checkpoint's).

    Raises:
        UserError: a checkpoint, tokenizer or text that cannot be read, a model without a language-model head, or a text of
            fewer than two tokens.
    """
    read = ReadText.of(model_dir, text, max_tokens)
    stored = stored_dtype(model_dir)
    dtype = dtype or compute_dtype(stored, device)[0]
    model = open_language_model(model_dir, dtype, device)
    reference = None if reference_dir is None else open_language_model(reference_dir, dtype, device)
    reference_bytes = None
    if reference is not None and reference_dir is not None:
        reference_bytes = _kv_bytes_per_token(reference, reference_dir)
    context = context or default_context(model.config)
    windows = read.windows(context)
    scores = compare_models(model, reference, windows, batch_size=batch_size, progress=progress)
    return Evaluation(
        **{field.name: getattr(scores, field.name) for field in fields(scores)},
        model=str(model_dir),
        reference=None if reference_dir is None else str(reference_dir),
        text=read.name,
        context=context,
        num_windows=len(windows),
        dtype=str(dtype).removeprefix("torch."),
        kv_bytes_per_token=_kv_bytes_per_token(model, model_dir),
        reference_kv_bytes_per_token=reference_bytes,
    )


@dataclass(frozen=True, slots=True)
class ReadText:
    """A text as tokens, to be cut into windows, or texts that were tokens before and are windows as they are."""

    name: str
    tokens: Int[Tensor, " token"] | None
    rows: Windows = ()

    @classmethod
    def of(cls, model_dir: str | Path, text: str | Table | NamedSample | None, max_tokens: int | None) -> "ReadText":
        """Read a text on rank 0.

        Raises:
            UserError: as `read_tokens`; of texts that are tokens none has two.
        """
        if isinstance(text, NamedSample):
            return cls(text.name, None, _given_windows(text))
        return cls(*on_main(lambda: read_tokens(model_dir, text, max_tokens)))

    def windows(self, context: int) -> Windows:
        return self.rows if self.tokens is None else split_windows(self.tokens, context)


def read_tokens(
    model_dir: str | Path, text: str | Table | None, max_tokens: int | None
) -> tuple[str, Int[Tensor, " token"]]:
    """Return the name of a text and its first tokens by the model's tokenizer.

    Raises:
        UserError: the text or tokenizer cannot be read, or there are fewer than two tokens.
    """
    source, documents = _text(text)
    tokens = token_stream(documents, open_tokenizer(model_dir), max_tokens)
    if len(tokens) < 2:
        raise UserError(f"{source}: gives {len(tokens)} tokens; need at least 2 to predict one from the other")
    return source, tokens


def open_language_model(path: str | Path, dtype: torch.dtype, device: str) -> "PreTrainedModel":
    """Return the model of a directory, of headfold's class where it needs one.

    Raises:
        UserError: it does not open, or has no language-model head.
    """
    config = read_config(Path(path))
    model = open_model(path, dtype=dtype, device=device, model_class=own_class(config, path))
    if model.get_output_embeddings() is None:
        name = type(model).__name__
        raise UserError(
            f"{path}: expected a language model, got {name}, which has no head; name a ForCausalLM in config.json"
        )
    return model


def _given_windows(given: NamedSample) -> Windows:
    """Return each text as a window, those of one length together."""
    ids, mask = given.tensors["input_ids"], given.tensors.get("attention_mask")
    lengths = [ids.shape[1]] * len(ids) if mask is None else mask.sum(1).tolist()
    windows = [
        row[:length] for row, length in sorted(zip(ids, lengths, strict=True), key=lambda pair: pair[1]) if length > 1
    ]
    if not windows:
        raise UserError(
            f"{given}: gives no text of at least 2 tokens, one to be predicted from the other; give longer ones"
        )
    return windows


def _text(source: str | Table | None) -> tuple[str, Iterator[str]]:
    """Return the name and documents of a source; of the bundled text where none is named."""
    if source is not None:
        corpus = open_corpus(source)
        return corpus.name, corpus.documents
    bundled = resources.files("headfold").joinpath("bundled", "heldout.txt")
    if not bundled.is_file():
        raise UserError("bundled/heldout.txt: expected in this installation, found none; name a text with --text FILE")
    return HELDOUT, iter([bundled.read_text(encoding="utf-8")])


def default_context(config: "PreTrainedConfig") -> int:
    """Return the default tokens per window: all positions of the model, at most `MAX_CONTEXT`."""
    return min(context_length(config.to_dict()) or MAX_CONTEXT, MAX_CONTEXT)


def split_windows(tokens: Int[Tensor, " token"], context: int) -> tuple[Int[Tensor, " _position"], ...]:
    """Return the tokens as consecutive windows of `context`; a last window of a single token predicts nothing and is dropped."""
    return tuple(window for window in tokens.split(context) if len(window) > 1)


def _kv_bytes_per_token(model: "PreTrainedModel", path: str | Path) -> int:
    """Return the bytes of K and V that one token adds to the cache, over all layers, in the checkpoint's own dtype."""
    tensors = Checkpoint.open(Path(path)).tensors
    return stored_kv_bytes_per_token(model.config.to_dict(), tensors, stored_dtype(path).itemsize)


def _text_config(model: "PreTrainedModel") -> Any:
    return model.config.get_text_config(decoder=True)


def compare_models(
    model: "PreTrainedModel",
    reference: "PreTrainedModel | None",
    windows: Windows,
    *,
    batch_size: int | None = None,
    num_bins: int = NUM_BINS,
    progress: Progress = no_progress,
) -> LossComparison:
    """Measure an open model, and its reference, on the same windows, with no more than one batch of logits in memory.

    Windows may differ in length; consecutive windows of equal length are batched. Log-probabilities are computed in float32 (float64 for
    float64 logits) and summed in float64.
    """
    start, context = time.perf_counter(), max(len(window) for window in windows)
    num_bins = min(num_bins, context - 1)
    totals = torch.zeros(5, num_bins, dtype=torch.float64)
    for sums in _shared_pass(model, reference, windows, batch_size, progress, over="windows"):
        bins = torch.arange(sums.shape[1]) * num_bins // (context - 1)
        totals.index_add_(1, bins, sums)
    count, nll, reference_nll, kl, agreements = (totals.sum(1)).tolist()
    alone = LossComparison(int(count), nll / count, _means(totals, 1), time.perf_counter() - start)
    if reference is None:
        return alone
    beside = (reference_nll / count, _means(totals, 2), kl / count, agreements / count)
    return LossComparison(alone.num_tokens, alone.nll, alone.nll_by_position, time.perf_counter() - start, *beside)


def losses_per_window(
    model: "PreTrainedModel",
    reference: "PreTrainedModel | None",
    windows: Windows,
    *,
    batch_size: int | None = None,
    progress: Progress = no_progress,
) -> list[Units]:
    """Return the figures of `compare_models` window by window: loss, and beside a reference KL and top-1 agreement, per token."""
    sums = _shared_pass(model, reference, windows, batch_size, progress, over="positions")
    tokens, nll, _, kl, agreements = torch.cat(sums, 1).numpy()

    def per_token(metric: str, sums: np.ndarray, lower_is_better: bool = True) -> Units:
        return Units(metric=metric, unit="windows", sums=np.stack([sums, tokens], 1), lower_is_better=lower_is_better)

    alone = [per_token("nll", nll)]
    return alone if reference is None else [*alone, per_token("kl", kl), per_token("top1_agreement", agreements, False)]


def _means(totals: Float[Tensor, "quantity bin"], row: int) -> tuple[float, ...]:
    return tuple((totals[row] / totals[0]).tolist())


def _batches(windows: Windows, batch_size: int) -> Iterator[Int[Tensor, "window position"]]:
    """Yield consecutive windows of one length, at most `batch_size` together."""
    batch: list[Tensor] = []
    for window in windows:
        if batch and (len(batch) == batch_size or len(batch[0]) != len(window)):
            yield torch.stack(batch)
            batch = []
        batch.append(window)
    yield torch.stack(batch)


def _shared_pass(
    model: "PreTrainedModel",
    reference: "PreTrainedModel | None",
    windows: Windows,
    batch_size: int | None,
    progress: Progress,
    *,
    over: Literal["windows", "positions"],
) -> list[Float[Tensor, "quantity _window_or_position"]]:
    """Return, for each batch of windows, the sums of the five quantities of `_of_batch` over its windows or over its positions."""
    longest = max(len(window) for window in windows)
    batch_size = batch_size or max(1, LOGIT_BUDGET // (longest * _text_config(model).vocab_size))
    dim = {"windows": 1, "positions": 2}[over]
    advance = counter(progress, "evaluate", sum(len(window) for window in windows))
    return run_shared(
        _batches(windows, batch_size),
        lambda batch: _of_batch(model, reference, batch).sum(dim),
        lambda batch: advance(batch.numel()),
    )


@torch.no_grad()
def _of_batch(
    model: "PreTrainedModel", reference: "PreTrainedModel | None", batch: Int[Tensor, "window position"]
) -> Float[Tensor, "quantity window position_minus_1"]:
    """Return five quantities of every predicted token of a batch: 1, loss, reference loss, KL and agreement."""
    logits, other = _logits(model, batch), None if reference is None else _logits(reference, batch)
    targets = batch[:, 1:]
    per_token = torch.zeros(5, *targets.shape, dtype=torch.float64)
    per_token[0] = 1
    rows = max(1, CHUNK // logits.shape[-1])
    for index in range(len(batch)):
        for at in range(0, targets.shape[1], rows):
            part = (index, slice(at, at + rows))
            per_token[(slice(1, 5), *part)] = _scores(
                logits[part], None if other is None else other[part], targets[part].to(logits.device)
            ).to("cpu", torch.float64)
    return per_token


def _logits(model: "PreTrainedModel", batch: Int[Tensor, "window token"]) -> Float[Tensor, "window token-1 vocab"]:
    """Return the logits that predict every token except the first."""
    return model(input_ids=batch.to(input_device(model)), use_cache=False).logits[:, :-1]


def _scores(
    logits: Float[Tensor, "position vocab"],
    other: Float[Tensor, "position vocab"] | None,
    targets: Int[Tensor, " position"],
) -> Float[Tensor, "4 position"]:
    """Return loss, reference loss, KL(reference ‖ model) and agreement of each position; zeros without a reference."""
    log_q = _log_softmax(logits)
    nll = -log_q.gather(1, targets[:, None])[:, 0]
    if other is None:
        return torch.stack([nll, *[torch.zeros_like(nll)] * 3])
    log_p = _log_softmax(other)
    reference_nll = -log_p.gather(1, targets[:, None])[:, 0]
    agreement = (logits.argmax(1) == other.argmax(1)).to(nll.dtype)
    kl = kl_div(log_q, log_p, reduction="none", log_target=True).sum(1)  # KL(p || q) despite the order
    return torch.stack([nll, reference_nll, kl, agreement])


def _log_softmax(logits: Float[Tensor, "position vocab"]) -> Float[Tensor, "position vocab"]:
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(1)
