"""What CTranslate2 computes of a written model, compared with headfold's runtime: logits, or log probabilities of forced tokens."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ..divergence import tolerance_of
from ..families.context import context_length
from .tokens import WHISPER_END, WHISPER_NO_TIMES, WHISPER_START, forbidden

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ITEMS, _TOKENS = 2, 24
Logits = Float[Tensor, "item position token"]


@torch.no_grad()
def difference_in_ct2(model: "PreTrainedModel", directory: Path) -> tuple[float, float]:
    """Return the largest difference between CTranslate2 and a float32 model on random inputs, and the tolerance."""
    length = min(_TOKENS, (context_length(model.config.to_dict()) or _TOKENS) - 4)
    allowed = torch.ones(model.config.vocab_size, dtype=torch.bool)
    allowed[forbidden(model.generation_config)] = False
    generator = torch.Generator().manual_seed(0)
    ids = allowed.nonzero()[:, 0][torch.randint(int(allowed.sum()), (2, _ITEMS, length), generator=generator)]
    kind = model.config.model_type if model.config.is_encoder_decoder else "text"
    logits, difference = _KINDS.get(kind, _of_pairs)(model, directory, ids, allowed)
    return difference, tolerance_of(logits, torch.float32)


def _of_text(model: "PreTrainedModel", directory: Path, ids: Tensor, allowed: Tensor) -> tuple[Logits, float]:
    """Return the runtime's logits of random tokens, and the largest difference of one."""
    import ctranslate2

    expected = model(ids[0], use_cache=False).logits
    generator = ctranslate2.Generator(str(directory), compute_type="float32")
    found = torch.from_numpy(np.array(generator.forward_batch(ids[0].tolist())))
    return expected, (found - expected)[..., allowed].abs().max().item()


def _of_pairs(model: "PreTrainedModel", directory: Path, ids: Tensor, allowed: Tensor) -> tuple[Logits, float]:
    """Return the runtime's logits of random pairs, and the largest difference of the log probability of a target token."""
    import ctranslate2

    tokens = json.loads((directory / "shared_vocabulary.json").read_text())
    config = json.loads((directory / "config.json").read_text())
    source, target = ([[tokens[id] for id in row] for row in part.tolist()] for part in ids)
    found = ctranslate2.Translator(str(directory), compute_type="float32").score_batch(source, target)
    around = [[tokens.index(token)] * _ITEMS for token in (config["decoder_start_token"], config["eos_token"]) if token]
    first, last = ([] if len(around) == 1 else around[:1]), around[-1:]
    whole = torch.cat([*(torch.tensor(part)[:, None] for part in first), ids[1], torch.tensor(last[0])[:, None]], 1)
    logits = model(input_ids=ids[0], decoder_input_ids=whole[:, :-1], use_cache=False).logits
    expected = _log_probabilities(logits, whole[:, 1:], allowed)
    return logits, _difference([item.log_probs for item in found], expected)


def _of_speech(model: "PreTrainedModel", directory: Path, ids: Tensor, allowed: Tensor) -> tuple[Logits, float]:
    """Return the runtime's logits of random speech, and the largest difference of the log probability of a word's token, among those
    of text.
    """
    import ctranslate2

    tokens, config = json.loads((directory / "vocabulary.json").read_text()), model.config
    start, no_times, end = (tokens.index(token) for token in (WHISPER_START, WHISPER_NO_TIMES, WHISPER_END))
    frames, text = 2 * config.max_source_positions, ids[1] % end
    features = torch.randn(_ITEMS, config.num_mel_bins, frames, generator=torch.Generator().manual_seed(0))
    whisper = ctranslate2.models.Whisper(str(directory), compute_type="float32")
    speech = ctranslate2.StorageView.from_array(features.numpy())
    found = whisper.align(speech, [start], text.tolist(), frames)
    before = torch.tensor([[start, no_times]] * _ITEMS)
    decoded = torch.cat([before, text], 1)[:, :-1]
    logits = model(input_features=features, decoder_input_ids=decoded, use_cache=False).logits
    expected = _log_probabilities(logits[:, 1:], text, torch.arange(len(allowed)) < end)
    return logits, _difference([np.log(item.text_token_probs) for item in found], expected)


_KINDS: Mapping[str, Callable[["PreTrainedModel", Path, Tensor, Tensor], tuple[Logits, float]]] = {
    "text": _of_text,
    "whisper": _of_speech,
}


def _log_probabilities(logits: Logits, ids: Tensor, allowed: Tensor) -> Float[Tensor, "item position"]:
    """Return the log probability of each of these tokens among those that are allowed."""
    return logits.masked_fill(~allowed, -torch.inf).log_softmax(-1).gather(-1, ids[..., None])[..., 0]


def _difference(found: list[Any], expected: Float[Tensor, "item position"]) -> float:
    return (torch.tensor(np.array(found)) - expected).abs().max().item()
