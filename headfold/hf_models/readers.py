"""Open what stands before a model: its tokenizer, image processor or feature extractor, checked against what the model takes."""

import functools
import inspect
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoint.config import read_config
from ..core.errors import UserError
from ..core.json_input import read_object
from .building import library_errors, quiet

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROCESSORS = ("preprocessor_config.json", "processor_config.json")
"""Files of a directory that describe how images or sound become inputs; one of them is there."""

MOST_TOKENS = 2**24
"""More than any vocabulary has; the tokenizers library makes a list as long as the greatest id, and ends the process where it cannot."""
_STRANGE = "\u0378 \U0001f9ea"
"""A text with letters that hardly any vocabulary has."""
_ONE_SIZE = {"vit", "deit", "clip", "clip_vision_model", "siglip", "siglip_vision_model"}
"""Models that take images of one size; others interpolate their positions."""


def open_tokenizer(path: str | Path) -> "PreTrainedTokenizerBase":
    """Open the tokenizer of a checkpoint directory.

    Raises:
        UserError: there is none, it does not load, or it has ids that no vocabulary has.
    """
    from transformers import AutoTokenizer

    files = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt", "spiece.model")
    if not any((Path(path) / name).exists() for name in files):
        raise UserError(
            f"{path}: expected a tokenizer (tokenizer.json …), found none; copy it there, or pass tokenizer= beside a model in memory"
        )
    check_ids(Path(path) / "tokenizer.json")
    with library_errors(path, "the tokenizer does not load"), quiet():
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    longest = tokenizer.model_max_length
    if isinstance(longest, bool) or not isinstance(longest, int | float) or not longest > 0:
        raise UserError(
            f"{path}/tokenizer_config.json: model_max_length: expected a positive number, got {longest!r:.60}; correct the file"
        )
    with library_errors(path, "the tokenizer refuses a text", "is its unknown token in its vocabulary?"), quiet():
        tokenizer(_STRANGE)
    return tokenizer


def image_size_of(config: Mapping[str, Any]) -> tuple[int, int] | None:
    """Return height and width of the images that a model takes; None where it interpolates its positions to any size."""
    size = (config.get("vision_config") or config).get("image_size")
    if config.get("model_type") not in _ONE_SIZE or not size:
        return None
    return (size, size) if isinstance(size, int) else tuple(size)


def check_ids(file: Path) -> None:
    """Check the ids in a tokenizer.json, if there is one.

    Raises:
        UserError: an id is no whole number below `MOST_TOKENS`.
    """
    if file.is_file():
        found = file.stat()
        _check_ids(file, (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns))


@functools.lru_cache(maxsize=16)
def _check_ids(file: Path, version: tuple[int, ...]) -> None:
    """Check the ids of a large file, which takes seconds, once per `version` of it."""
    found = read_object(file)
    model, added = found.get("model"), found.get("added_tokens")
    words = model.get("vocab") if isinstance(model, dict) else None
    ids = list(words.values()) if isinstance(words, dict) else []
    ids += [token.get("id") for token in added if isinstance(token, dict)] if isinstance(added, list) else []
    for number in ids:
        if type(number) is not int or not 0 <= number < MOST_TOKENS:
            raise UserError(
                f"{file}: expected ids of tokens from 0 to {MOST_TOKENS - 1}, got {number!r:.60}; copy the model's own file there"
            )


def open_processor(kind: str, path: str | Path) -> Any:
    """Open the image processor ("images", on pillow and numpy) or feature extractor ("audio") of a checkpoint directory.

    Raises:
        UserError: there is none, it does not load, or it makes other sizes than the model takes.
    """
    from transformers import AutoFeatureExtractor, AutoImageProcessor

    if not any((Path(path) / name).is_file() for name in PROCESSORS):
        raise UserError(f"{path}: expected the model's processor (preprocessor_config.json), found none; copy it there")
    auto, options = (AutoImageProcessor, {"backend": "pil"}) if kind == "images" else (AutoFeatureExtractor, {})
    with library_errors(path, "the processor does not load"), _unwarned():
        processor = auto.from_pretrained(path, local_files_only=True, trust_remote_code=False, **options)
    made, taken = _sizes(kind, processor, read_config(Path(path)), path)
    if made != taken:
        raise UserError(
            f"{path}/preprocessor_config.json: expected inputs of the model's size {taken}, got {made}; copy the model's own file there"
        )
    return processor


def open_joint_processor(path: str | Path, beside: str) -> Any:
    """Open the processor of a wrapper: it takes "images" or "audio" (`beside`) and texts together, and puts into a text the tokens that
    stand for an image or for sound.

    Raises:
        UserError: there is none, it does not load, or it does not take both together.
    """
    from transformers import AutoProcessor

    if not any((Path(path) / name).is_file() for name in PROCESSORS):
        raise UserError(f"{path}: expected the model's processor (processor_config.json), found none; copy it there")
    check_ids(Path(path) / "tokenizer.json")
    with library_errors(path, "the processor does not load"), _unwarned():
        processor = AutoProcessor.from_pretrained(path, local_files_only=True, trust_remote_code=False, backend="pil")
    part = {"images": "image_processor", "audio": "feature_extractor"}[beside]
    together = beside in inspect.signature(type(processor).__call__).parameters
    if not (together and hasattr(processor, part) and hasattr(processor, "tokenizer")):
        raise UserError(
            f"{path}: expected a processor of {beside} and text together, got {type(processor).__name__}; copy the model's own files "
            "there, or give batches of its inputs in Python"
        )
    return processor


@contextmanager
def _unwarned() -> Iterator[None]:
    """Silence what a processor warns of, such as bands that no frequency falls into, and a division by an `image_std` of zero."""
    with warnings.catch_warnings(), quiet():
        warnings.simplefilter("ignore")
        yield


def _sizes(kind: str, processor: Any, config: Mapping[str, Any], path: str | Path) -> tuple[Any, Any]:
    """Return the size of inputs that a processor makes and the one that its model takes; twice nothing where any size will do."""
    if kind == "audio":
        rate = getattr(processor, "sampling_rate", None)
        if type(rate) is not int or rate < 1:
            raise UserError(
                f"{path}/preprocessor_config.json: sampling_rate: expected a positive whole number, got {rate!r:.60}; correct the file"
            )
        with library_errors(path, "the processor does not work"), _unwarned():
            made = processor([0.0] * 400, sampling_rate=rate, return_tensors="pt")
            shape = made["input_values" if "input_values" in made else "input_features"].shape
        if "input_values" in made:
            return None, None
        bands, positions = config.get("num_mel_bins"), config.get("max_source_positions")
        taken = bands or shape[1], 2 * positions if positions else shape[2]
        return tuple(shape[1:]), taken
    size = image_size_of(config)
    if size is None:
        return None, None
    try:
        from PIL import Image
    except ImportError:  # refused in words where images are decoded
        return None, None
    # Of the model's own size, as a processor may leave sizes as they are.
    channels = (config.get("vision_config") or config).get("num_channels", 3)
    blank = Image.new("RGB" if channels == 3 else "L", size[::-1])
    with library_errors(path, "the processor does not work"), _unwarned():
        pixels = processor(images=[blank], return_tensors="pt")["pixel_values"]
    if not pixels.isfinite().all():
        raise UserError(
            f"{path}/preprocessor_config.json: expected finite pixels of a black image, got others; is image_std zero? Copy the model's "
            "own file there"
        )
    return tuple(pixels.shape[-2:]), size
