"""Batches of a model's inputs, as a DataLoader yields them, put together to one sample."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor
from torch.nn.functional import pad

from ..core.errors import UserError, listed
from ..corpus.pairs import IGNORED
from ..corpus.samples import Sample, main_input
from ..families.wrapped import is_wrapper
from ..hf_models.readers import image_size_of

MAIN = {"input_ids": 2, "pixel_values": 4, "input_features": 3, "input_values": 2}
"""The tensors that a batch is known by, and their axes."""
MOST = 2**24
"""Tokens, or items, that are read of data of which no amount is named."""
_USED = {
    "text": ("input_ids", "attention_mask"),
    "sentences": ("input_ids", "attention_mask", "token_type_ids", "labels"),
    "pairs": ("input_ids", "attention_mask", "labels", "decoder_input_ids", "decoder_attention_mask"),
    "images": ("pixel_values", "labels"),
    "captions": ("pixel_values", "input_ids", "attention_mask"),
    "audio": ("input_features", "labels", "decoder_input_ids", "decoder_attention_mask"),
    "samples": ("input_values", "attention_mask", "labels", "decoder_input_ids", "decoder_attention_mask"),
    "sound": ("input_values", "attention_mask"),
    "illustrated": (
        *("input_ids", "pixel_values", "attention_mask", "token_type_ids", "mm_token_type_ids"),
        *("image_sizes", "pixel_attention_mask", "image_grid_thw"),
    ),
    "spoken": ("input_ids", "input_features", "attention_mask", "feature_attention_mask"),
}
"""By kind of data the tensors that are used; the first is required. "samples" are audio for models that read sound as it is, and
"illustrated" captions as wrappers read them."""
_NEEDED = {
    "captions": ("pixel_values", "input_ids"),
    "illustrated": ("input_ids", "pixel_values"),
    "spoken": ("input_ids", "input_features"),
}
"""The tensors that are required, where that is not the first alone."""
_IN_TEXT = ("illustrated", "spoken")
_BESIDE_TEXT = {"pixel_values", "pixel_values_videos", "input_features", "input_values"}
"""What a wrapper puts in the place of tokens of its text, which say nothing without it."""
_FILL = {"labels": IGNORED}
"""Padding, where it is not zero."""


@dataclass(frozen=True, slots=True)
class Need:
    """The data that a model needs."""

    kind: str
    """Kind of data (`samples.kind_of`)."""
    config: Mapping[str, Any]
    """The model's config.json."""
    context: int
    """Tokens after which texts are cut."""
    limit: int | None = None
    """Tokens of text, or items of other data, after which nothing more is read."""
    say: Callable[[str], None] = lambda note: None
    """Called with what is left out."""
    beside_text: int | None = None
    """The limit, in items, where a wrapper is given texts with images or sound; None where it may not be."""

    @property
    def vocabulary(self) -> int | None:
        """The number of tokens of the model, where its config says it."""
        return (self.config.get("text_config") or self.config).get("vocab_size")

    def amount(self, sample: Sample) -> int:
        """Return what the limit counts."""
        return int(sample["attention_mask"].sum()) if self.kind == "text" else len(main_input(sample))


def sample_of_batches(batches: Iterator[Any], need: Need, name: str) -> Sample:
    """Return batches as one sample, its texts padded on the right, and read no further than the limit.

    Texts that are all as long as the longest, for a language model, are packed text: `input_ids` alone. Of decoder inputs without labels
    the labels follow, but for the last, which is the input's own.

    Raises:
        UserError: a batch that is no mapping, lacks a tensor, has others than the first batch or tensors that do not belong together,
            tokens beyond the vocabulary, padding alone, numbers that are not finite or of another size than the model takes; none at all.
    """
    parts: list[Sample] = []
    count = 0
    for number, batch in enumerate(batches, 1):
        need = need if parts else _need_of(batch, need)
        part = _read(batch, need, f"{name}: batch {number}", need.say if number == 1 else lambda note: None)
        if parts and part.keys() != parts[0].keys():
            raise UserError(
                f"{name}: batch {number}: expected {', '.join(parts[0])} as in the first batch, got {', '.join(part)}; give the same in all"
            )
        parts.append(part)
        count += need.amount(part)
        if count >= (need.limit or MOST):
            break
    if not parts:
        raise UserError(f"{name}: expected batches, got none; was the loader read before?")
    if need.limit is None and count >= MOST:
        raise UserError(f"{name}: expected at most {MOST} tokens or items, got more; name how many to read")
    sample = _cut({key: _joined([part[key] for part in parts], key, name) for key in parts[0]}, need)
    if need.kind in ("text", "sound") and sample["attention_mask"].all():
        del sample["attention_mask"]
    return sample


def _need_of(first: Any, need: Need) -> Need:
    """Return the need that the first batch meets: a wrapper may have images in its text, and some models of speech read sound as it is."""
    if need.kind == "audio" and need.config.get("model_type") == "moonshine":
        return replace(need, kind="samples")
    if need.beside_text is None or not isinstance(first, Mapping):
        return need
    hears = need.config.get("vision_config") is None
    if first.get("input_features" if hears else "pixel_values") is None:
        return need
    return replace(need, kind="spoken" if hears else "illustrated", limit=need.beside_text)


def _read(batch: Any, need: Need, where: str, say: Callable[[str], None]) -> Sample:
    """Return the tensors of a batch that are used, checked."""
    if not isinstance(batch, Mapping):
        raise UserError(
            f"{where}: expected a dict of tensors by name, such as input_ids and attention_mask, got {type(batch).__name__}; let it "
            "give dicts"
        )
    main, used = _USED[need.kind][0], _USED[need.kind]
    if lacking := [key for key in _NEEDED.get(need.kind, (main,)) if batch.get(key) is None]:
        raise UserError(
            f"{where}: expected {lacking[0]}, which the model reads, got {listed(list(map(str, batch)), 8)}; add it"
        )
    if need.kind == "text" and is_wrapper(need.config) and (seen := _BESIDE_TEXT & batch.keys()):
        raise UserError(
            f"{where}: expected text alone, got {listed(sorted(seen))}, in whose place tokens of the text stand; give texts without it"
            + (", or with it in every batch" if need.beside_text is not None else "")
        )
    if unused := [str(key) for key in batch if key not in used]:
        say(f"{where.rpartition(':')[0]}: {listed(unused, 8)} of every batch left out")
    tensors = {key: _tensor(batch[key], f"{where}: {key}") for key in used if batch.get(key) is not None}
    if "image_grid_thw" in tensors:
        tensors["pixel_values"] = _by_image(tensors, where)
    if tensors[main].ndim == MAIN[main] - 1:  # one item that is not in a batch
        tensors = {key: tensor[None] for key, tensor in tensors.items()}
    if tensors[main].ndim != MAIN[main] or not tensors[main].numel():
        raise UserError(
            f"{where}: {main}: expected {MAIN[main]} axes, the first of items, got the shape {tuple(tensors[main].shape)}; correct it"
        )
    for key, tensor in tensors.items():
        if not tensor.ndim or len(tensor) != len(tensors[main]):
            raise UserError(
                f"{where}: {key}: expected {len(tensors[main])} items as in {main}, got the shape {tuple(tensor.shape)}; "
                + (
                    "give one image or recording with each text, or texts alone"
                    if need.kind in _IN_TEXT
                    else "correct it"
                )
            )
    return _texts(tensors, need, where) | _targets(tensors, need, where) | _numbers(tensors, need, where)


def _by_image(tensors: Sample, where: str) -> Tensor:
    """Return patches of several images, which a processor gives as one row, with an axis of images."""
    grid, patches = tensors["image_grid_thw"], tensors["pixel_values"]
    if grid.ndim != 2 or not len(grid) or (grid != grid[0]).any() or len(patches) != int(grid.prod(1).sum()):
        raise UserError(
            f"{where}: image_grid_thw: expected images of one size, with as many patches as pixel_values has, got grids of the shape "
            f"{tuple(grid.shape)} for {len(patches)} patches; resize the images to one size"
        )
    return patches.unflatten(0, (len(grid), -1))


def _tensor(value: Any, where: str) -> Tensor:
    try:
        return torch.as_tensor(value).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(
            f"{where}: expected a tensor, got {type(value).__name__} ({' '.join(str(error).split()):.80}); pad its items to one length"
        ) from error


def _texts(tensors: Sample, need: Need, where: str) -> Sample:
    """Return tokens and their mask with the padding of each text moved to its end, and zero there; of an encoder also the types."""
    if "input_ids" not in tensors:
        return {}
    ids = tensors["input_ids"]
    if ids.ndim != 2:
        raise UserError(f"{where}: input_ids: expected items of tokens, got the shape {tuple(ids.shape)}; correct it")
    mask = _mask(tensors.get("attention_mask"), ids, where, "input_ids")
    if need.kind in _IN_TEXT and (longest := int(mask.sum(1).max())) > need.context:
        raise UserError(
            f"{where}: expected at most {need.context} tokens in a text with images or sound, which is not cut, got {longest}; give a "
            "longer context, or shorter texts"
        )
    _check_tokens(ids[mask], need, f"{where}: input_ids")
    # Positions are counted from the first token on, so what stands before it would move them.
    order = (~mask).long().argsort(dim=1, stable=True)[:, : min(int(mask.sum(1).max()), need.context)]
    sample = {
        "input_ids": ids.long().masked_fill(~mask, 0).gather(1, order),
        "attention_mask": mask.gather(1, order).long(),
    }
    for key in ("token_type_ids", "mm_token_type_ids"):
        if (types := tensors.get(key)) is not None and types.shape == ids.shape:
            sample[key] = types.long().masked_fill(~mask, 0).gather(1, order)
    return sample


def _mask(mask: Tensor | None, items: Tensor, where: str, name: str) -> Bool[Tensor, "item position"]:
    """Return which tokens of texts, or samples of sound, are not padding."""
    found = torch.ones_like(items, dtype=torch.bool) if mask is None else mask != 0
    if found.shape != items.shape:
        raise UserError(
            f"{where}: attention_mask: expected the shape of {name}, {tuple(items.shape)}, got {tuple(found.shape)}; correct the batch"
        )
    if not found.any(1).all():
        empty = int((~found.any(1)).nonzero()[0]) + 1
        raise UserError(
            f"{where}: {name}: expected more than padding in every item, got padding alone in item {empty}; leave such items out"
        )
    return found


def _check_tokens(ids: Tensor, need: Need, where: str) -> None:
    if ids.is_floating_point() or ids.is_complex():
        raise UserError(f"{where}: expected whole numbers, got {ids.dtype}; give the ids of tokens")
    most = need.vocabulary
    if len(ids) and (int(ids.min()) < 0 or (most is not None and int(ids.max()) >= most)):
        raise UserError(
            f"{where}: expected tokens from 0 to {'the last' if most is None else most - 1} of the model's vocabulary, got "
            f"{int(ids.min())} to {int(ids.max())}; use the model's own tokenizer"
        )


def _targets(tensors: Sample, need: Need, where: str) -> Sample:
    """Return labels, and what a decoder reads where that is given; of models that write nothing the classes, if there are any."""
    labels, read = tensors.get("labels"), tensors.get("decoder_input_ids")
    if need.kind not in ("pairs", "audio", "samples"):
        classes = labels is not None and labels.ndim == 1 and not labels.is_floating_point()
        return {"labels": labels.long()} if labels is not None and classes else {}
    if labels is None and read is None:
        raise UserError(
            f"{where}: expected labels or decoder_input_ids, what the decoder reads or writes, got neither; add them"
        )
    for key in ("labels", "decoder_input_ids"):
        if (tensor := tensors.get(key)) is not None:
            if tensor.ndim != 2 or (read is not None and tensor.shape != read.shape):
                raise UserError(
                    f"{where}: {key}: expected one token for each item and position, got the shape {tuple(tensor.shape)}; correct the batch"
                )
            _check_tokens(tensor[tensor != IGNORED] if key == "labels" else tensor.flatten(), need, f"{where}: {key}")
    if labels is None:
        assert read is not None
        mask = tensors.get("decoder_attention_mask", torch.ones_like(read))
        labels = torch.cat([read[:, 1:], read[:, -1:]], 1).masked_fill(mask == 0, IGNORED)
    if not (labels != IGNORED).any(1).all():
        raise UserError(
            f"{where}: labels: expected tokens in every item, got padding alone in one; leave such items out"
        )
    found = {"labels": labels} if read is None else {"labels": labels, "decoder_input_ids": read}
    return {key: tensor[:, : need.context].long() for key, tensor in found.items()}


def _numbers(tensors: Sample, need: Need, where: str) -> Sample:
    """Return images or sound in float32, as processors give them, with what says which of it is padding."""
    beside = ("image_sizes", "pixel_attention_mask", "image_grid_thw", "feature_attention_mask")
    found: Sample = {key: tensors[key] for key in beside if key in tensors}
    if "input_values" in tensors:
        found["attention_mask"] = _mask(
            tensors.get("attention_mask"), tensors["input_values"], where, "input_values"
        ).long()
    for key in ("pixel_values", "input_features", "input_values"):
        if key not in tensors:
            continue
        tensor, expected = tensors[key].float(), _sizes(key, need)
        if any(size not in (None, got) for size, got in zip(expected, tensor.shape[1:], strict=False)):
            sizes = "x".join("any" if size is None else str(size) for size in expected)
            got = "x".join(map(str, tensor.shape[1:]))
            raise UserError(
                f"{where}: {key}: expected items of {sizes}, which the model takes, got {got}; use its own processor"
            )
        if not tensor.isfinite().all():
            raise UserError(f"{where}: {key}: expected finite numbers, got NaN or infinity; look at the data")
        found[key] = tensor
    return found


def _sizes(key: str, need: Need) -> tuple[int | None, ...]:
    """Return the sizes of an item that a model takes, None for any: of an image channels, height and width, of sound bands and frames.

    Those of images in texts, and of sound as it is, are left to the model.
    """
    config = need.config
    if need.kind in (*_IN_TEXT, "samples", "sound"):
        return ()
    if key == "pixel_values":
        return (config.get("vision_config") or config).get("num_channels", 3), *(image_size_of(config) or (None, None))
    positions = config.get("max_source_positions")
    return config.get("num_mel_bins"), 2 * positions if positions else None


def _joined(tensors: list[Tensor], key: str, name: str) -> Tensor:
    """Return the items of all batches, texts padded to the longest."""
    if tensors[0].ndim == 2:
        widest = max(tensor.shape[1] for tensor in tensors)
        tensors = [pad(tensor, (0, widest - tensor.shape[1]), value=_FILL.get(key, 0)) for tensor in tensors]
    for number, tensor in enumerate(tensors, 1):
        if tensor.shape[1:] != tensors[0].shape[1:]:
            raise UserError(
                f"{name}: batch {number}: {key}: expected items of the shape {tuple(tensors[0].shape[1:])} as in the first batch, got "
                f"{tuple(tensor.shape[1:])}; give all items one size"
            )
    return torch.cat(tensors)


def _cut(sample: Sample, need: Need) -> Sample:
    """Return the first items, as many as reach the limit."""
    if need.limit is None:
        return sample
    kept = need.limit
    if need.kind == "text":
        before = sample["attention_mask"].sum(1).cumsum(0)
        kept = int((before < need.limit).sum()) + 1
    return {key: tensor[:kept] for key, tensor in sample.items()}
