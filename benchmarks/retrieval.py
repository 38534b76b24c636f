"""What a language model finds again in a long text: shares of right digits, by the length of the text."""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LENGTHS = (1024, 2048, 4096, 8000)
DEPTHS = (0.1, 0.5, 0.9)
FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
NAMES = ("amber", "basalt", "cedar", "delta", "ember", "fjord", "garnet", "heron", "indigo", "jasper", "kelp", "lotus")


def opened(made: Path) -> tuple[Any, Any]:
    """Return a language model and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    dtype = (
        torch.bfloat16 if DEVICE == "cuda" else torch.float32
    )  # many processors compute in bfloat16 many times slower
    model = AutoModelForCausalLM.from_pretrained(made, dtype=dtype, trust_remote_code=True)
    return model.eval().to(DEVICE), AutoTokenizer.from_pretrained(made)


def pieces(tokenizer: Any, text: str) -> list[int]:
    """Return the tokens of a text alone."""
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def digits(tokenizer: Any, text: str) -> list[int]:
    """Return the tokens of a number, one for each digit."""
    ids = pieces(tokenizer, text)
    if len(ids) != len(text):
        raise SystemExit(f"expected a tokenizer with a token for each digit, got {len(ids)} of {text}")
    return ids


def passkeys(made: Path, lengths: Sequence[int] = LENGTHS) -> dict[str, float]:
    """Return by length the share of digits of a five-digit key that a model repeats from a text, a key per depth."""
    model, tokenizer = opened(made)
    filler = pieces(tokenizer, FILLER)

    def asked(length: int, depth: float, number: int) -> tuple[list[int], list[int]]:
        key = f"{71839 + 4217 * number % 28000:05d}"
        parts = f"The pass key is {key}. Remember it. {key} is the pass key. ", "What is the pass key? The pass key is "
        told, question = (pieces(tokenizer, part) for part in parts)
        answer = digits(tokenizer, key)
        room = length - len(told) - len(question) - len(answer)
        text = (filler * (room // len(filler) + 1))[:room]
        before = int(depth * room)
        return [*text[:before], *told, *text[before:], *question], answer

    return _shares(model, lengths, asked)


def lookups(made: Path, lengths: Sequence[int] = LENGTHS) -> dict[str, float]:
    """Return by length the share of digits of a value that a model repeats from a list of names and values, a name per depth."""
    model, tokenizer = opened(made)

    def asked(length: int, depth: float, number: int) -> tuple[list[int], list[int]]:
        draw = random.Random(1000 * length + number)
        seen, lines, ids = set[str](), list[tuple[str, str]](), list[list[int]]()
        room = length - 32
        while sum(map(len, ids)) < room:
            name = f"{draw.choice(NAMES)}-{draw.choice(NAMES)}-{draw.randrange(100)}"
            if name in seen:
                continue
            seen.add(name)
            lines.append((name, f"{draw.randrange(10000, 100000)}"))
            ids.append(pieces(tokenizer, f"{name} = {lines[-1][1]}\n"))
        name, value = lines[int(depth * len(lines))]
        text = [token for line in ids for token in line]
        return [*text, *pieces(tokenizer, f"{name} = ")], digits(tokenizer, value)

    return _shares(model, lengths, asked)


def named_passkeys(made: Path, text: str, lengths: Sequence[int] = LENGTHS) -> dict[str, float]:
    """Return by length the share of digits of twelve keys that a model repeats from a text, each told among others, by its name."""
    model, tokenizer = opened(made)
    words = pieces(tokenizer, text[: 8 * max(lengths)])
    found = {}
    for length in lengths:
        draw = random.Random(length)
        keys = [f"{draw.randrange(10000, 100000)}" for _ in NAMES]
        told = [
            pieces(tokenizer, f"The pass key of {name} is {key}. Remember it. {key} is the pass key of {name}. ")
            for name, key in zip(NAMES, keys, strict=True)
        ]
        questions = [pieces(tokenizer, f"What is the pass key of {name}? The pass key of {name} is ") for name in NAMES]
        answers = [digits(tokenizer, key) for key in keys]
        step = (length - sum(map(len, told)) - max(map(len, questions)) - 5) // len(NAMES)
        ids = [
            token for number, key in enumerate(told) for token in (*words[number * step : (number + 1) * step], *key)
        ]
        found[str(length)] = _share_of_cached(model, ids, questions, answers)
    return found


@torch.no_grad()
def _share_of_cached(model: Any, ids: list[int], questions: list[list[int]], answers: list[list[int]]) -> float:
    """Return the share of right tokens of the answers, each given the text and one question; the text runs once."""
    cache = model(torch.tensor([ids], device=DEVICE), use_cache=True, logits_to_keep=1).past_key_values
    right = 0
    for question, answer in zip(questions, answers, strict=True):
        asked = torch.tensor([[*question, *answer[:-1]]], device=DEVICE)
        logits = model(asked, past_key_values=cache, use_cache=True, logits_to_keep=len(answer)).logits
        right += int((logits[0].argmax(-1).cpu() == torch.tensor(answer)).sum())
        cache.crop(-asked.shape[1])
    return right / sum(map(len, answers))


def _shares(model: Any, lengths: Sequence[int], asked: Any) -> dict[str, float]:
    """Return the share of right tokens of the answers, each given the text and the answer up to it."""
    found = {}
    for length in lengths:
        right = total = 0
        for number, depth in enumerate(DEPTHS):
            text, answer = asked(length, depth, number)
            ids = torch.tensor([[*text, *answer]], device=DEVICE)
            with torch.no_grad():
                predicted = model(ids, logits_to_keep=len(answer) + 1).logits[0, :-1].argmax(-1).cpu()
            right, total = right + int((predicted == torch.tensor(answer)).sum()), total + len(answer)
        found[str(length)] = right / total
    return found
