"""Let the original and folds of it write for the same inputs: texts of an encoder-decoder, or recordings of a model of speech."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..checkpoint.config import read_config
from ..core.errors import UserError
from ..core.progress import Progress, counter
from ..corpus.audio import encode_audio, read_audio
from ..corpus.pairs import encode_pairs, read_pairs, with_languages
from ..corpus.samples import Sample
from ..evaluate.data import default_context
from ..evaluate.speech import longest_transcript
from ..evaluate.translation import generate_texts
from ..hf_models import compute_dtype, open_model, open_processor, open_tokenizer, stored_dtype
from ..runtime.load import own_class
from .contents import OutputSample

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NUM_ITEMS = 3
"""Of the data that are shown."""


def outputs(
    original: Path,
    folds: Mapping[str, Path],
    kind: str,
    source: str | None,
    columns: Sequence[str],
    prompts: Sequence[str],
    *,
    new_tokens: int,
    device: str,
    progress: Progress,
) -> list[OutputSample]:
    """Return what each model writes for each of the `prompts`, or for the first items of a `source`, greedily.

    Models are opened one at a time and compute in one dtype. `kind` is "pairs" or "audio".

    Raises:
        UserError: a model or its tokenizer does not load, a model writes no text, or the source cannot be read.
    """
    tokenizer = with_languages(open_tokenizer(original), columns)
    if source is None and columns and getattr(tokenizer, "tgt_lang", None) != columns[-1]:
        raise UserError(
            f"--columns {','.join(columns)}: expected the two languages of the prompts as {original} names them (such as "
            "eng_Latn,deu_Latn), got others; leave --columns out, or give --text SOURCE"
        )
    if kind == "audio":
        assert source is not None
        given, expected, sample = _recordings(original, source, columns)
    else:
        pairs = [(prompt, "") for prompt in prompts] if source is None else read_pairs(source, columns, NUM_ITEMS)
        given, expected = [text for text, _ in pairs], [target for _, target in pairs]
        context = default_context(original, read_config(original))
        sample = encode_pairs(
            [(text, text) for text in given], tokenizer, context
        )  # of which the inputs alone are used
    dtype = compute_dtype(stored_dtype(original), device)[0]
    advance, written = counter(progress, "samples", 1 + len(folds)), []
    for path in (original, *folds.values()):
        model = open_model(path, dtype=dtype, device=device, model_class=own_class(read_config(path)))
        written.append(generate_texts(model, sample, tokenizer, max_new_tokens=_most(model, kind, new_tokens, path)))
        del model  # before the next is opened, so that one at a time is in memory
        advance(1)
    own, *others = written
    return [
        OutputSample(text, wanted, own[number], {name: each[number] for name, each in zip(folds, others, strict=True)})
        for number, (text, wanted) in enumerate(zip(given, expected, strict=True))
    ]


def _most(model: "PreTrainedModel", kind: str, new_tokens: int, path: Path) -> int:
    """Return the tokens that a model may write; `generate_texts` knows the limit of those that write nothing before a text."""
    if not model.can_generate():
        raise UserError(f"{path}: expected a model that writes text, got {type(model).__name__}; leave --text out")
    return longest_transcript(model, new_tokens) if kind == "audio" else new_tokens


def _recordings(original: Path, source: str, columns: Sequence[str]) -> tuple[list[str], list[str], Sample]:
    """Return which recordings they are, what is said in each, and the inputs of the model."""
    sounds, texts = read_audio(source, columns, NUM_ITEMS)
    named = [
        f"recording {number} of {Path(source).name}, {len(samples) / rate:.1f} s"
        for number, (samples, rate) in enumerate(sounds, 1)
    ]
    return named, texts or [""] * len(sounds), encode_audio(sounds, None, open_processor("audio", original), None, 1)
