"""What headfold's runtime computes of a text, which engines are compared with."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..checkpoint.reader import Checkpoint
from ..core.errors import UserError
from ..corpus.text import documents
from ..families.context import context_length
from ..hf_models import open_tokenizer
from ..runtime.load import load
from .ask import Request

TOKENS = 240
CHARACTERS = 4000
"""Of a text, which every engine divides into tokens; those past the request's are not computed."""


@dataclass(frozen=True, slots=True)
class Expected:
    """A request to engines, and what headfold's runtime answers in float32."""

    request: Request
    logits: Float[Tensor, "token vocab"]
    written_logits: Float[Tensor, "new vocab"]
    """Those that the greedy tokens were chosen by."""
    greedy: tuple[int, ...]
    tokens: tuple[int, ...]
    """Of the whole text."""


@torch.no_grad()
def expected(checkpoint: Checkpoint, text: Path, num_tokens: int | None, new_tokens: int) -> Expected:
    """Return a request to continue the beginning of a text, with what headfold's runtime computes.

    `num_tokens` are `TOKENS` by default, or what the model takes.

    Raises:
        UserError: the model or its tokenizer does not load, the text is shorter than `num_tokens`, or the model's context is.
    """
    context = context_length(checkpoint.config)
    room = (num_tokens or TOKENS) if context is None else context - new_tokens
    if room < (num_tokens or 1):
        raise UserError(
            f"{checkpoint.path}: expected room for {num_tokens or 1} tokens and {new_tokens} new ones, got a context of {context}; choose "
            "fewer with --tokens or --new-tokens"
        )
    num_tokens = num_tokens or min(TOKENS, room)
    if not text.exists():
        raise UserError(f"{text}: expected a text to compute on, found nothing there; check the path")
    written = next(iter(documents(text)))[:CHARACTERS]
    tokens = open_tokenizer(checkpoint.path)(written)["input_ids"]
    if len(tokens) < num_tokens:
        raise UserError(
            f"{text}: expected {num_tokens} tokens in the first {CHARACTERS} characters, got {len(tokens)}; name a longer text, or choose "
            "fewer with --tokens"
        )
    model: Any = load(checkpoint.path, dtype=torch.float32)
    ids = torch.tensor([tokens[:num_tokens]])
    model.generation_config.eos_token_id = None  # neither an end nor, as a minimum length makes it, impossible
    continued = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False, pad_token_id=0,
    )  # fmt: skip
    logits = model(continued[:, :-1]).logits[0]
    if not torch.isfinite(logits).all():
        raise UserError(f"{checkpoint.path}: expected finite logits, got NaN or infinity; fold again from good weights")
    request = Request(tokens[:num_tokens], new_tokens, written, logits.shape[-1])
    greedy = tuple(continued[0, num_tokens:].tolist())
    return Expected(request, logits[:num_tokens], logits[num_tokens - 1 :], greedy, tuple(tokens))
