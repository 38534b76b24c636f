"""Inputs of a model for calibration and evaluation, for every kind of model, in batches."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoint.config import check_fields, read_config
from ..core.errors import UserError
from ..core.json_input import read_object
from ..families.context import context_length
from ..families.wrapped import is_wrapper, language_config
from ..hf_models import open_processor, open_tokenizer
from ..hf_models.readers import image_size_of
from .audio import encode_audio, read_audio
from .captions import read_captions
from .illustrated import read_illustrated, read_spoken
from .images import image_blocks, label_id
from .pairs import IGNORED, encode_pairs, read_pairs, with_languages
from .rows import Table
from .sentences import encode_sentences, read_sentences, unknown_share
from .sound import encode_pieces, read_pieces
from .speech import Written, encode_windows, read_windows
from .windows import draw_windows

Sample = dict[str, Tensor]
"""Keyword arguments of the model's forward, batch first, all items padded to one length."""


@dataclass(frozen=True, slots=True)
class NamedSample:
    """A sample that a program gave, with a name for messages and results."""

    name: str
    tensors: Sample

    def __str__(self) -> str:
        return self.name


MAX_CONTEXT = 1024
"""Longest calibration window; shorter where the model's own context is."""
MOST_UNKNOWN = 0.5
"""Share of unknown tokens from which that is said of sentences."""
_SPEECH = re.compile(r"whisper|speech_to_text|^moonshine$")
_SOUND = re.compile(r"^(wav2vec2|hubert)$")
_PADDED_TEXTS = ("siglip", "siglip_text_model")
"""`model_type`s whose texts all have the length of the context; they read the embedding at its end, and attend to the padding."""
_VISION = re.compile(r"^(vit|deit|beit|swin|dinov|ijepa)|vision_model$|^(clip|siglip)$")
_ENCODER = re.compile(r"bert|electra|mpnet|^(ernie|esm|xmod)$|text_model$")
_PADDED = {"input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids", "input_values"}
_DECODED = {"labels", "decoder_input_ids"}
_MAIN = ("input_ids", "pixel_values", "input_features", "input_values")


def kind_of(config: Mapping[str, Any], columns: Sequence[str] = ()) -> str:
    """Return the kind of data that a model of this config.json takes: "text", "pairs", "sentences", "images", "captions" (images
    with text), "spoken" (sound with text), "audio" (speech, and what is said) or "sound" (of encoders).

    It follows from the head that `architectures` names; for a bare model, from its `model_type`. All others take text. A wrapper takes
    text or, where two `columns` of the data are named, images with text if it sees images, and sound with text if it hears.
    """
    if is_wrapper(config):
        seen = {"vision_config": "captions", "audio_config": "spoken"} if len(columns) == 2 else {}
        return next((kind for field, kind in seen.items() if config.get(field) is not None), "text")
    head = next(iter(config.get("architectures") or []), "")
    family = str(config.get("model_type", ""))
    if _SPEECH.search(family) and not head.endswith("ForCausalLM"):
        return "audio"
    if _SOUND.search(family):
        return "sound"
    if head.endswith(("ForCausalLM", "LMHeadModel")):
        return "text"
    towers = {"text_config", "vision_config"} <= config.keys() and head.endswith(("CLIPModel", "SiglipModel"))
    if towers:
        return "captions"
    if head.endswith("EncoderModel"):
        return "sentences"
    if config.get("is_encoder_decoder"):
        return "pairs"
    if _VISION.search(family) or head.endswith(("ForImageClassification", "VisionModel")):
        return "images"
    encodes = head.endswith(("ForMaskedLM", "ForSequenceClassification", "ForTokenClassification", "TextModel"))
    return "sentences" if encodes or _ENCODER.search(family) else "text"


def window_length(config: Mapping[str, Any], context: int | None) -> int:
    """Return the tokens of a calibration window, or where texts are cut.

    Raises:
        UserError: more are named than the model takes.
    """
    limit = context_length(config) or MAX_CONTEXT
    if context is not None and context > limit:
        raise UserError(f"--context {context}: the model's own context is {limit}; choose at most that")
    return context or min(limit, MAX_CONTEXT)


def draw_sample(
    kind: str,
    source: str | Table,
    *,
    path: Path,
    num_items: int | None,
    context: int,
    seed: int | None,
    columns: Sequence[str] = (),
    joined: bool = False,
    say: Callable[[str], None] = lambda note: None,
) -> Sample:
    """Return `num_items` items of a source, drawn from all of it by `seed`, as inputs of the model in directory `path`.

    text: `input_ids`, full windows of `context` tokens. pairs: `input_ids`, `attention_mask`, `labels` (-100 at padding).
    sentences: `input_ids`, `attention_mask`, `token_type_ids` if the tokenizer makes them, `labels` if a second column is named.
    images: `pixel_values`, `labels` if known. captions: both of them. spoken: what the processor of a wrapper makes of both.
    audio: `input_features`, or `input_values` and `attention_mask`, `labels` if there are transcripts, and `decoder_input_ids` if they
    are joined. sound: `input_values`, of pieces of one length. Texts are truncated to `context` tokens. A source with fewer items, or
    without `num_items`, gives all of them. Without a seed (not for text), the first items are taken in the source's order. `joined`
    fills the model's windows of sound with several recordings, where they have transcripts; `say` is told what had to be left out. For
    large sources of images use `image_sample_blocks`.

    Raises:
        UserError: an unreadable or empty source, a missing column, no tokenizer or processor in `path`, a source of another kind.
    """
    request = (source, columns, num_items, seed)
    if kind == "images":
        blocks = list(image_sample_blocks(source, path=path, num_items=num_items, seed=seed, columns=columns))
        return {name: torch.cat([block[name] for block in blocks]) for name in blocks[0]}
    if kind == "audio":
        start = _decoder_start(path)
        if joined and num_items is not None and seed is not None:
            extractor = open_processor("audio", path)
            seconds, rate = getattr(extractor, "chunk_length", None), extractor.sampling_rate
            windows = read_windows(source, columns, num_items, seed, seconds, rate, say) if seconds else None
            if windows:
                writer = open_tokenizer(path)
                return encode_windows(windows, extractor, writer, context, start, _written(path, writer))
        sounds, texts = read_audio(*request)
        if texts is None and _config(path).get("is_encoder_decoder"):
            raise UserError(
                f"{source}: expected a transcript of every recording, which the decoder reads, got recordings without; write NAME.txt "
                "beside NAME.wav, or name a column of text with --columns AUDIO,TEXT"
            )
        tokenizer, extractor = open_tokenizer(path) if texts is not None else None, open_processor("audio", path)
        seconds = getattr(extractor, "chunk_length", None)
        if texts and seconds and (cut := sum(len(samples) > seconds * rate for samples, rate in sounds)):
            say(
                f"{source}: {cut} of {len(sounds)} recordings last longer than the model's {seconds:g} seconds and are cut there, unlike "
                "their transcripts, which raises loss and word error rate; cut both"
            )
        return encode_audio(sounds, texts, extractor, tokenizer, context, start)
    if kind == "spoken" or (kind == "captions" and is_wrapper(_config(path))):
        read = read_spoken if kind == "spoken" else read_illustrated
        return read(source, path, context, columns, num_items, seed, say)
    if kind == "sound":
        extractor = open_processor("audio", path)
        return encode_pieces(read_pieces(*request, extractor.sampling_rate), extractor)
    tokenizer, filled = open_tokenizer(path), _config(path).get("model_type") in _PADDED_TEXTS
    if kind == "captions":
        images = open_processor("images", path)
        return read_captions(source, images, tokenizer, context, columns, num_items, seed, filled=filled)
    if kind == "pairs":
        return encode_pairs(read_pairs(*request), with_languages(tokenizer, columns), context)
    if kind == "sentences":
        sentences, labels = read_sentences(*request)
        sample = encode_sentences(sentences, tokenizer, context, filled=filled)
        if (share := unknown_share(sample["input_ids"], tokenizer)) > MOST_UNKNOWN:
            say(
                f"{source}: {share:.0%} of the tokens are unknown to the tokenizer, so little is measured of the model; give text of its "
                "vocabulary (a model of residues may read them apart: M K T)"
            )
        return sample if labels is None else sample | {"labels": _label_ids(labels, path, source)}
    assert kind == "text" and num_items is not None and seed is not None, kind
    if source == "self":
        raise UserError(
            "self: expected a source of text, but its text is sampled from the model (corpus.windows.draw_windows)"
        )
    num_tokens = num_items * context
    return {
        "input_ids": draw_windows(
            source, tokenizer=tokenizer, model=None, num_tokens=num_tokens, context=context, seed=seed, columns=columns
        )
    }


def image_sample_blocks(
    source: str | Table, *, path: Path, num_items: int | None, seed: int | None, columns: Sequence[str] = ()
) -> Iterator[Sample]:
    """Yield the images of `draw_sample` one block at a time, so that no more than that is in memory.

    Raises:
        UserError: as `draw_sample`.
    """
    config = _config(path)
    size = image_size_of(config)
    blocks = image_blocks(
        source,
        open_processor("images", path),
        columns=columns,
        num_items=num_items,
        seed=seed,
        label2id=config.get("label2id"),
        num_channels=config.get("num_channels", 3),
    )
    for block in blocks:
        height, width = block["pixel_values"].shape[-2:]
        if size not in (None, (height, width)):  # a processor may leave sizes as they are
            raise UserError(
                f"{source}: expected images of {size[1]}x{size[0]} pixels, which the model takes, got {width}x{height}; resize them"
            )
        yield block


def _label_ids(labels: Sequence[Any], path: Path, source: str | Table) -> Tensor:
    label2id = _config(path).get("label2id") or {}
    return torch.tensor([label_id(label, label2id, str(source)) for label in labels])


def _config(path: Path) -> dict[str, Any]:
    return read_config(path)


def _generation(path: Path) -> dict[str, Any]:
    file = path / "generation_config.json"
    return read_object(file) if file.is_file() else {}


def _decoder_start(path: Path) -> int | None:
    """Return the token that the decoder starts from, which transformers 5 may leave to the generation config."""
    named = _config(path).get("decoder_start_token_id")
    if named is not None:
        return named
    stated = _generation(path)
    check_fields(stated, f"{path}/generation_config.json")
    return stated.get("decoder_start_token_id")


def _written(path: Path, tokenizer: Any) -> Written:
    """Return the tokens that say how a Whisper writes, from its generation config or else by their names."""
    generation, vocabulary = _generation(path), tokenizer.get_vocab()
    after = generation.get("prev_sot_token_id", vocabulary.get("<|startofprev|>"))
    no_times = generation.get("no_timestamps_token_id", vocabulary.get("<|notimestamps|>"))
    for name, number in (("prev_sot_token_id", after), ("no_timestamps_token_id", no_times)):
        if number is not None and (type(number) is not int or not 0 <= number < len(tokenizer)):
            raise UserError(
                f"{path}/generation_config.json: {name}: expected a token of the vocabulary of {len(tokenizer)}, got {number!r:.60}; "
                "correct the file"
            )
    language = str(generation.get("language") or "en").strip("<|>")
    prompt = (vocabulary.get(f"<|{language}|>"), vocabulary.get("<|transcribe|>"))
    multilingual = generation.get("is_multilingual") and None not in prompt
    return Written(after, no_times, tuple(one for one in prompt if one is not None) if multilingual else ())


def main_input(sample: Mapping[str, Tensor]) -> Tensor:
    """Return what a model reads first: tokens, images or sound."""
    return next(sample[name] for name in (*_MAIN, *sample) if name in sample)


def batches(sample: Sample, items_per_batch: int) -> Iterator[Sample]:
    """Yield `items_per_batch` consecutive items at a time, without the columns that are padding in all items of a batch.

    Truncated tensors are copied: stock losses flatten labels by `view`, which fails on a slice.
    """
    num_items = len(main_input(sample))
    for at in range(0, num_items, items_per_batch):
        yield _trimmed({name: tensor[at : at + items_per_batch] for name, tensor in sample.items()})


def _trimmed(batch: Sample) -> Sample:
    mask, labels = batch.get("attention_mask"), batch.get("labels")
    if mask is not None:
        batch |= {name: batch[name][:, : _extent(mask != 0)].contiguous() for name in _PADDED & batch.keys()}
    if labels is not None and labels.ndim == 2:
        extent = _extent(labels != IGNORED)
        batch |= {name: batch[name][:, :extent].contiguous() for name in _DECODED & batch.keys()}
    return batch


def _extent(is_real: Tensor) -> int:
    """Return the number of columns up to the last one that is not padding in some row; at least one, since no model takes none."""
    return max(1, int(is_real.any(0).nonzero().max().item()) + 1) if is_real.any() else 1


def random_sample(kind: str, config: Mapping[str, Any], num_items: int) -> Sample:
    """Return random inputs of the shapes that a model of this kind and config takes."""
    generator = torch.Generator().manual_seed(0)
    if kind == "captions":
        texts = random_sample("sentences", config["text_config"], num_items)
        return {**texts, **random_sample("images", config["vision_config"], num_items)}
    if kind == "images":
        size = config.get("image_size") or 224
        shape = (num_items, config.get("num_channels") or 3, *((size, size) if isinstance(size, int) else size))
        return {"pixel_values": torch.randn(shape, generator=generator)}
    labels = {} if kind != "audio" else {"labels": random_tokens(config, num_items, 16)}
    if kind == "sound" or config.get("model_type") == "moonshine":
        return {"input_values": torch.randn((num_items, 16_000), generator=generator), **labels}
    if kind == "audio":
        frames = 2 * (config.get("max_source_positions") or 1500)
        features = torch.randn((num_items, config.get("num_mel_bins") or 80, frames), generator=generator)
        return {"input_features": features, **labels}
    tokens = random_tokens(config, num_items, min(32, context_length(config) or 32))
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    return inputs if kind == "sentences" else {**inputs, "labels": random_tokens(config, num_items, 24)}


def random_tokens(config: Mapping[str, Any], num_items: int, length: int) -> Tensor:
    """Return random tokens of a model's vocabulary."""
    if not (num_words := language_config(config).get("vocab_size")):
        raise UserError("config.json: expected vocab_size, got none; correct the config")
    return torch.randint(num_words, (num_items, length), generator=torch.Generator().manual_seed(0))
