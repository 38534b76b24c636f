"""Continue prompts greedily with the original and with folds of it, and find where they part."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Int
from torch import Tensor

from ..core.errors import UserError
from ..core.progress import Progress, counter
from ..evaluate.perplexity import open_language_model
from ..families.context import context_length
from ..hf_models import compute_dtype, open_tokenizer, stored_dtype
from ..hf_models.streamed import input_device
from .contents import Continuation, TextSample

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PROMPTS = (
    "The first thing that travellers notice when they arrive in the old town is",
    "Water boils at a lower temperature in the mountains because",
    "def is_prime(number):\n",
)
NEW_TOKENS = 64


@torch.no_grad()
def continuations(
    original: Path,
    folds: Mapping[str, Path],
    prompts: Sequence[str],
    *,
    new_tokens: int,
    device: str,
    progress: Progress,
) -> list[TextSample]:
    """Return what each model writes after each prompt. Models are opened one at a time and compute in one dtype.

    Raises:
        UserError: a model or its tokenizer does not load, a prompt has no tokens, or the context is too short for it.
    """
    tokenizer = open_tokenizer(original)
    inputs = [_tokens(tokenizer, prompt) for prompt in prompts]
    dtype = compute_dtype(stored_dtype(original), device)[0]
    advance = counter(progress, "samples", len(inputs) * (1 + len(folds)))
    model = open_language_model(original, dtype, device)
    for prompt, tokens in zip(prompts, inputs, strict=True):
        _check_room(model, prompt, len(tokens) + new_tokens)
    written = []
    for tokens in inputs:
        written.append(_greedy(model, tokens, new_tokens))
        advance(1)
    found: list[dict[str, Continuation]] = [{} for _ in inputs]
    for name, path in folds.items():
        del model  # before the next is opened, so that one at a time is in memory
        model = open_language_model(path, dtype, device)
        for number, tokens in enumerate(inputs):
            found[number][name] = _continuation(model, tokenizer, tokens, written[number], new_tokens)
            advance(1)
    return [
        TextSample(prompt, _pieces(tokenizer, text), each)
        for prompt, text, each in zip(prompts, written, found, strict=True)
    ]


def _tokens(tokenizer: Any, prompt: str) -> list[int]:
    found = list(tokenizer(prompt)["input_ids"])
    if not found:
        raise UserError(f"--prompt {prompt!r:.60}: expected a text of at least one token, got none; write another")
    return found


def _check_room(model: "PreTrainedModel", prompt: str, needed: int) -> None:
    context = context_length(model.config.to_dict())
    if context is not None and needed > context:
        raise UserError(
            f"--prompt {prompt!r:.60}: expected at most {context} tokens with the new ones, the context of the model, got {needed}; give a "
            "shorter prompt, or fewer --new-tokens"
        )


def _greedy(model: "PreTrainedModel", tokens: Sequence[int], new_tokens: int) -> list[int]:
    """Return the tokens that a model writes, up to an end of text."""
    ends = model.config.get_text_config().eos_token_id
    ends = set(ends) if isinstance(ends, list | tuple) else {ends}
    written: list[int] = []
    step, cache = _batch(model, tokens), None
    while len(written) < new_tokens and not ends & set(written[-1:]):
        output: Any = model(input_ids=step, past_key_values=cache, use_cache=True)
        cache, step = output.past_key_values, output.logits[:, -1:].argmax(-1)
        written.append(int(step))
    return written


def _continuation(
    model: "PreTrainedModel", tokenizer: Any, tokens: Sequence[int], original: Sequence[int], new_tokens: int
) -> Continuation:
    """Return what a fold writes, and what it would have chosen at each place of the original's text."""
    written = _greedy(model, tokens, new_tokens)
    same = [ours == theirs for ours, theirs in zip(written, original, strict=False)]
    logits: Any = model(input_ids=_batch(model, [*tokens, *original[:-1]]), use_cache=False).logits
    chosen = logits[0, len(tokens) - 1 :].argmax(-1).tolist()
    differ = [(theirs, ours) for theirs, ours in zip(original, chosen, strict=True) if theirs != ours]
    others = [(tokenizer.decode([theirs]), tokenizer.decode([ours])) for theirs, ours in differ]
    return Continuation(_pieces(tokenizer, written), [*same, False].index(False), len(original) - len(differ), others)


def _batch(model: "PreTrainedModel", tokens: Sequence[int]) -> Int[Tensor, "1 token"]:
    return torch.tensor([list(tokens)], device=input_device(model))


def _pieces(tokenizer: Any, tokens: Sequence[int]) -> list[str]:
    """Return the text of each token, such that together they are the text of all: a letter may be several tokens, the last has it."""
    pieces, before = [], ""
    for end in range(1, len(tokens) + 1):
        text = tokenizer.decode(tokens[:end])
        whole = text if end == len(tokens) else text.rstrip("\ufffd")
        pieces.append(whole[len(before) :] if whole.startswith(before) else "")
        before = whole if whole.startswith(before) else before
    return pieces
