"""Run the model over calibration data and sum what each attention site sees."""

import inspect
import sys
import threading
from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .core.errors import UserError
from .core.stats import SiteStats
from .corpus.pairs import IGNORED
from .corpus.samples import batches as in_batches
from .corpus.samples import main_input
from .families.spec import Site
from .families.wrapped import AUDIO, VISION, WRAPPERS
from .hf_models.streamed import input_device
from .measure import attended, second_moment
from .parallel import all_gather, all_reduce, falls_here, world_size

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Sample = Mapping[str, Tensor]
"""Keyword arguments of the model's forward, batch first: `input_ids` and whatever belongs to them, or `pixel_values` …"""

TOKENS_PER_BATCH = 4096
"""Large enough that the D² conversion of each batch's product to float64 is small beside the product itself."""
ITEMS_PER_BATCH = 64
"""Batch size of images, and the most of captioned ones."""
RECORDINGS_PER_BATCH = 16
"""Batch size of sound: an encoder of 30 seconds has several times the positions of a batch of text."""


def batches(sample: Sample) -> Iterator[Sample]:
    """Yield items in batches of about `TOKENS_PER_BATCH`: texts of different lengths the longest first, so that little of it is padding."""
    if not is_padded_text(sample):
        yield from batches_in_order(sample, TOKENS_PER_BATCH)
        return
    lengths = text_lengths(sample)
    left = lengths.argsort(descending=True, stable=True)
    while len(left):
        many = max(1, TOKENS_PER_BATCH // max(1, int(lengths[left[0]])))
        yield from in_batches({name: tensor[left[:many]] for name, tensor in sample.items()}, many)
        left = left[many:]


def batches_in_order(sample: Sample, num_tokens: int) -> Iterator[Sample]:
    """Yield items in their own order, as many as have `num_tokens` with the padding of the sample, each padded as its batch needs."""
    tokens = sample.get("input_ids")
    by_tokens = ITEMS_PER_BATCH if tokens is None else max(1, num_tokens // tokens.shape[1])
    if {"input_features", "input_values"} & sample.keys():
        by_tokens = min(ITEMS_PER_BATCH, RECORDINGS_PER_BATCH)
    return in_batches(dict(sample), min(by_tokens, ITEMS_PER_BATCH) if "pixel_values" in sample else by_tokens)


def num_tokens(batch: Sample) -> int:
    """Return what progress counts: tokens of the main input, or items where it has none."""
    first = main_input(batch)
    return first.numel() if "input_ids" in batch else len(first)


def is_packed_text(sample: Sample) -> bool:
    """Return whether a sample is packed text: full windows, which need no mask."""
    return sample.keys() == {"input_ids"}


def is_padded_text(sample: Sample) -> bool:
    """Return whether a sample is texts of different lengths, and nothing beside them but labels."""
    reads_text = "attention_mask" in sample and main_input(sample) is sample.get("input_ids")
    return reads_text and not {"pixel_values", "input_features"} & sample.keys()


def total_tokens(sample: Sample) -> int:
    """Return the tokens, or items, of one pass over the sample."""
    return sum(num_tokens(batch) for batch in batches(sample))


def text_lengths(sample: Sample) -> Tensor:
    """Return the tokens of each text; of a pair those of the longer one."""
    lengths, labels = sample["attention_mask"].sum(1), sample.get("labels")
    return lengths if labels is None or labels.ndim != 2 else torch.maximum(lengths, (labels != IGNORED).sum(1))


def run(model: "PreTrainedModel", batch: Sample) -> Any:
    """Run one forward pass without cache or loss and, where the model has a separate body, without its head."""
    body = body_of(model, batch)
    inputs: dict[str, Any] = {name: t.to(input_device(model)) for name, t in batch.items() if name != "labels"}
    if getattr(model.config, "is_encoder_decoder", False) and "decoder_input_ids" not in inputs:
        labels = batch["labels"].to(input_device(model))
        inputs["decoder_input_ids"] = decoder_inputs(model, labels)
    return body(**inputs, **without_cache(model, body.forward))


def without_cache(model: "PreTrainedModel", forward: Callable[..., Any]) -> dict[str, bool]:
    """Return the keyword that tells a forward of the model to make no cache, where it takes one; wrappers pass it to the model inside."""
    takes_it = "use_cache" in inspect.signature(forward).parameters or model.config.model_type in WRAPPERS
    return {"use_cache": False} if takes_it else {}


def body_of(model: "PreTrainedModel", batch: Sample) -> Any:
    """Return the model without its head, or with it where the rest does not take the batch (DINOv3's `base_model` is its layers)."""
    body: Any = model.base_model
    return body if batch.keys() & inspect.signature(body.forward).parameters.keys() else model


def decoder_inputs(model: "PreTrainedModel", labels: Tensor) -> Tensor:
    """Return the labels shifted one to the right, as the decoder reads them when the model computes a loss."""
    prepare: Any = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    if prepare is not None:
        return prepare(labels=labels)
    config = model.config
    shifted = torch.full_like(labels, config.pad_token_id)
    shifted[:, 1:] = labels[:, :-1].masked_fill(labels[:, :-1] == IGNORED, config.pad_token_id)
    shifted[:, 0] = config.decoder_start_token_id
    return shifted


@torch.no_grad()
def collect(
    model: "PreTrainedModel",
    sites: list[Site],
    sample: Sample,
    progress: Callable[[int], None] = lambda tokens: None,
    statistics: Container[str] | None = None,
) -> dict[str, SiteStats]:
    """Return the statistics of every site from one pass over `sample`, which several processes share.

    `progress` is called with the number of tokens of each finished batch. `statistics` names those that are needed (default: all); the
    second moments are always measured, what attention looks at (`attended`) only if it is among them.

    Raises:
        UserError: activations are not finite.
    """
    observer = Observer(model, statistics)
    with observer.watching(sites):
        for number, batch in enumerate(batches(sample)):
            if falls_here(number):
                observer.batch = batch
                run(model, batch)
            progress(num_tokens(batch))
    return observer.take()


class Observer:
    """Sums what attention sites see of the batches that a model, or a block of it, runs on.

    `batch` is the batch that runs, and must be set before it does. `statistics` as in `collect`.
    """

    def __init__(self, model: "PreTrainedModel", statistics: Container[str] | None = None) -> None:
        self.batch: Sample = {}
        self._model, self._statistics = model, statistics
        self._sums: dict[str, SiteStats] = {}

    @contextmanager
    def watching(self, sites: list[Site]) -> Iterator[None]:
        """Return a context in which these sites are observed."""
        hooks = [(key_path(site), self._hook(site, queries=False)) for site in sites]
        hooks += [(site.paths["q"], self._hook(site, queries=True)) for site in sites if site.reads_encoder]
        watched = sites if self._statistics is None or "attended" in self._statistics else []
        with _pre_hooks(hooks, self._model), _watching(self._model, watched, self._sums):
            yield

    def _hook(self, site: Site, *, queries: bool) -> Callable[..., None]:
        def observe(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            x = inputs[0]
            if x.ndim != 3:
                x = x.reshape(len(main_input(self.batch)), -1, x.shape[-1])
            seen = second_moment.observe(x, mask_of(site, self.batch, x, queries=queries))
            count = int(seen["second"][-1, -1])
            found = SiteStats({"query_second": seen["second"]}, 0) if queries else SiteStats(seen, count)
            self.add(site.name, found)

        return observe

    def add(self, name: str, seen: SiteStats) -> None:
        """Add sums to those of a site, such as earlier ones, which this takes over."""
        _add(self._sums, name, seen)

    def take(self) -> dict[str, SiteStats]:
        """Return the sums of every site observed since the last call, over all processes, which must ask at the same point.

        Raises:
            UserError: activations are not finite.
        """
        sums = _summed_over_ranks(self._sums)
        self._sums.clear()
        _refuse_not_finite(sums)
        return {name: SiteStats({key: t.cpu() for key, t in s.tensors.items()}, s.count) for name, s in sums.items()}


def _summed_over_ranks(sums: dict[str, SiteStats]) -> dict[str, SiteStats]:
    """Sum over all processes; one without a batch takes part with zeros."""
    if world_size() == 1:
        return dict(sums)
    shapes: dict[str, dict[str, torch.Size]] = {}
    counts: dict[str, int] = {}
    for seen in all_gather(
        {name: (s.count, {key: t.shape for key, t in s.tensors.items()}) for name, s in sums.items()}
    ):
        for name, (count, shaped) in seen.items():
            shapes[name] = shapes.get(name, {}) | shaped
            counts[name] = counts.get(name, 0) + count
    own = {name: sums[name].tensors if name in sums else {} for name in shapes}
    return {
        name: SiteStats(
            {
                key: all_reduce(own[name][key] if key in own[name] else torch.zeros(shape, dtype=torch.float64))
                for key, shape in shaped.items()
            },
            counts[name],
        )
        for name, shaped in shapes.items()
    }


def _refuse_not_finite(sums: Mapping[str, SiteStats]) -> None:
    for name, stats in sums.items():
        if not all(torch.isfinite(t).all() for t in stats.tensors.values()):
            raise UserError(
                f"{name}: activations are not finite on calibration text; does the source have NaN weights?"
            )


_WATCHED: dict[nn.Module, Callable[..., None]] = {}
"""Attention modules that a calibration of this process observes now, each with the function to call."""
_WATCHING = threading.Lock()


@contextmanager
def _watching(model: "PreTrainedModel", sites: list[Site], sums: dict[str, SiteStats]) -> Iterator[None]:
    """Record how far back the sites with RoPE look, while their attention runs as before.

    Classes whose attention does not go through transformers' interface are not observed.
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    def recorder(site: Site) -> Callable[..., None]:
        def record(query: Tensor, key: Tensor, mask: Tensor | None, **options: Any) -> None:
            _add(sums, site.name, SiteStats(attended.observe(query, key, mask, **options), 0))

        return record

    rotary = [site for site in sites if site.key_freedom.rotary_dim]
    watched = {model.get_submodule(site.core): recorder(site) for site in rotary}
    name = getattr(model.config, "_attn_implementation", None) or "eager"
    with _WATCHING:
        if watched and not isinstance(ALL_ATTENTION_FUNCTIONS.get(name), _Watch):
            ALL_ATTENTION_FUNCTIONS[name] = _Watch(ALL_ATTENTION_FUNCTIONS, name)
        _WATCHED.update(watched)
    try:
        yield
    finally:
        with _WATCHING:
            for module in watched:
                del _WATCHED[module]
            if not _WATCHED:
                for each in list(ALL_ATTENTION_FUNCTIONS.values()):
                    if isinstance(each, _Watch):
                        each.leave()


class _Watch:
    """An attention function that passes the queries and keys of observed modules on, then calls the stock function whose place it takes."""

    def __init__(self, functions: Any, name: str) -> None:
        self._functions, self._name = functions, name
        self._local = functions._local_mapping.get(name)
        self._stock = functions.get(name)

    def leave(self) -> None:
        """Put the stock function back."""
        if self._local is None:
            del self._functions[self._name]
        else:
            self._functions[self._name] = self._local

    def __call__(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *rest: Any,
        **keywords: Any,
    ) -> Any:
        if (record := _WATCHED.get(module)) is not None and query.shape[2] > 1:
            options = {word: keywords[word] for word in ("scaling", "softcap") if keywords.get(word) is not None}
            record(query, key, attention_mask, **options)
        # `eager` has no entry: every class brings its own.
        stock = self._stock or vars(sys.modules[type(module).__module__])["eager_attention_forward"]
        return stock(module, query, key, value, attention_mask, *rest, **keywords)


def _add(sums: dict[str, SiteStats], name: str, seen: SiteStats) -> None:
    """Add in place: copying the sums of a large layer for every batch would cost as much as measuring it."""
    old = sums.get(name, SiteStats({}, 0))
    for key, tensor in seen.tensors.items():
        if key in old.tensors:
            old.tensors[key].add_(tensor.to(old.tensors[key].device))
    sums[name] = SiteStats({**seen.tensors, **old.tensors}, old.count + seen.count)


def mask_of(site: Site, batch: Sample, x: Tensor, *, queries: bool) -> Tensor | None:
    """Return which positions of `x`, the input of the site's queries or of its keys, are not padding; None if all count."""
    if site.stack in (VISION, AUDIO) and "input_ids" in batch:
        return None  # the mask is that of the texts beside the images, or the sound
    decodes = "labels" in batch and batch["labels"].ndim == 2 and site.stack == "decoder"
    mask = batch.get("attention_mask")
    if decodes and (queries or not site.reads_encoder):
        mask = batch["labels"] != IGNORED
    elif mask is not None and "input_values" in batch:
        mask = mask_of_frames(mask, x.shape[1])
    return mask.bool().to(x.device) if mask is not None and mask.shape == x.shape[:2] else None


def mask_of_frames(mask: Tensor, frames: int) -> Tensor:
    """Return the mask of a model's frames of sound, each of which covers many samples, from that of the samples."""
    return mask[:, torch.arange(frames, device=mask.device) * mask.shape[1] // frames]


def key_path(site: Site) -> str:
    """Return the path in the model of the linear that computes K; its input is that of K and V."""
    return site.paths.get("k") or site.paths["qkv"]


@contextmanager
def _pre_hooks(hooks: list[tuple[str, Callable[..., None]]], model: nn.Module) -> Iterator[None]:
    handles = [model.get_submodule(path).register_forward_pre_hook(hook) for path, hook in hooks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
