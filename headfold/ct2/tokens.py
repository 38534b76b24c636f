"""The vocabulary of a checkpoint as CTranslate2 reads it: a token for every row of the output, and the tokens for special purposes."""

from collections.abc import Sequence
from itertools import product
from typing import TYPE_CHECKING, Any

from .model import Heads

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

WHISPER_END, WHISPER_START, WHISPER_NO_TIMES = "<|endoftext|>", "<|startoftranscript|>", "<|notimestamps|>"
"""Tokens that CTranslate2 looks up by these names."""
_SECONDS = 0.02
"""Between two timestamps of Whisper."""


def vocabulary(tokenizer: "PreTrainedTokenizerBase", vocab_size: int) -> list[str]:
    """Return the tokens by their ids. One that the tokenizer does not have gets a name; of Whisper's, that of a timestamp."""
    by_id = {number: token for token, number in tokenizer.get_vocab().items()}
    first = tokenizer.get_vocab().get(WHISPER_NO_TIMES, vocab_size) + 1

    def name(number: int) -> str:
        return f"<|{(number - first) * _SECONDS:.2f}|>" if number >= first else f"<unused_{number}>"

    return [by_id.get(number, name(number)) for number in range(vocab_size)]


def tokens_why_not(tokenizer: "PreTrainedTokenizerBase", tokens: Sequence[str], config: Any) -> str | None:
    """Return why CTranslate2 cannot load a vocabulary."""
    if len(set(tokens)) < len(tokens):
        twice = next(token for token in tokens if tokens.count(token) > 1)
        return f"expected a token for every id, got {twice!r} for several"
    if config.model_type == "whisper":
        absent = [token for token in (WHISPER_END, WHISPER_START, WHISPER_NO_TIMES) if token not in tokens]
        return f"expected a tokenizer of Whisper, got one without {', '.join(absent)}" if absent else None
    if _end(tokenizer, tokens, config) is None:
        return "expected a tokenizer with a token that ends a text, got one without eos_token"
    start = getattr(config, "decoder_start_token_id", None)
    if start is not None and not (isinstance(start, int) and 0 <= start < len(tokens)):
        return f"expected decoder_start_token_id with a token, got {start!r}; correct the config"
    return None


def set_tokens(spec: Any, tokenizer: "PreTrainedTokenizerBase", tokens: list[str], config: Any) -> None:
    """Register the vocabulary, and name the special tokens of a model other than Whisper, all of which must be there.

    An unknown token that the tokenizer lacks is that of padding, or the one that ends a text: CTranslate2 would add another one, for which
    the embeddings have no row.
    """
    if hasattr(spec, "register_vocabulary"):
        spec.register_vocabulary(tokens)
    else:
        spec.register_source_vocabulary(tokens)
        spec.register_target_vocabulary(tokens)
    if config.model_type == "whisper":
        return
    end = _end(tokenizer, tokens, config)
    pad = tokenizer.pad_token if tokenizer.pad_token in tokens else end
    spec.config.eos_token = end
    spec.config.unk_token = tokenizer.unk_token if tokenizer.unk_token in tokens else pad
    spec.config.bos_token = tokenizer.bos_token if tokenizer.bos_token in tokens else pad
    if hasattr(spec.config, "decoder_start_token"):
        start = config.decoder_start_token_id
        spec.config.decoder_start_token = None if start is None else tokens[start]


def set_whisper(spec: Any, config: Any, generation: Any, crossing: Sequence[Heads]) -> None:
    """Set what Whisper's decoding reads: tokens that are not said, those of languages, and the heads that follow the speech."""
    spec.config.suppress_ids = list(generation.suppress_tokens or [])
    spec.config.suppress_ids_begin = list(generation.begin_suppress_tokens or [])
    spec.config.lang_ids = sorted((getattr(generation, "lang_to_id", None) or {}).values())
    later = product(range(len(crossing) // 2, len(crossing)), range(config.decoder_attention_heads))
    listed = getattr(generation, "alignment_heads", None) or later
    spec.config.alignment_heads = [[layer, crossing[layer].slots.index(head)] for layer, head in listed]


def forbidden(generation: Any) -> list[int]:
    """Return the single tokens that generation_config.json never lets a model say."""
    return [ids[0] for ids in getattr(generation, "bad_words_ids", None) or [] if len(ids) == 1]


def _end(tokenizer: "PreTrainedTokenizerBase", tokens: Sequence[str], config: Any) -> str | None:
    """Return the token that ends a text: the tokenizer's, or the first of the config's."""
    if tokenizer.eos_token in tokens:
        return tokenizer.eos_token
    ids = config.eos_token_id
    first = ids[0] if isinstance(ids, list) and ids else ids
    return tokens[first] if isinstance(first, int) and first < len(tokens) else None
