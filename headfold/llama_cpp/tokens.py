"""The tokenizer of a checkpoint as llama.cpp reads it: tokens with their types, merges, and the name of the text's first division."""

import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..hf_models.readers import check_ids

if TYPE_CHECKING:
    import gguf

GPT_2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA_3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN_2 = LLAMA_3.replace(r"\p{N}{1,3}", r"\p{N}")
BLOOM = r" ?[^(\s|[.,!?…。，、।۔،])]+"
_DIGITS = r"\p{N}"
DIVISIONS: Mapping[tuple[str, ...], str] = {
    (GPT_2,): "gpt-2",
    (_DIGITS, GPT_2): "smollm",
    (LLAMA_3,): "llama-bpe",
    (QWEN_2,): "qwen2",
    (BLOOM,): "bloom",
}
"""The patterns that a text is divided by before merges → what llama.cpp calls them."""
_IGNORE_MERGES = ("llama-bpe",)
"""Divisions with which llama.cpp takes a word that is a token as it is, without merges."""
_SPACE = "▁"
_PHI_3 = re.compile("phi-?3", re.IGNORECASE)
_KEEPS_SPACE = {"<unk>", "<s>", "<|endoftext|>"}


def tokenizer_why_not(directory: Path) -> str | None:
    """Return why llama.cpp cannot read the tokenizer."""
    if not (directory / "tokenizer.json").is_file():
        return "expected tokenizer.json beside the weights, got none; save the tokenizer there with transformers"
    try:
        tokenizer = _read(directory)
        _special(directory, 1)
    except Exception as error:  # tokenizers raises Exception itself, gguf whatever a file of another form leads to
        said = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        return f"expected a tokenizer that tokenizers and gguf read, got {said}; save it again with transformers"
    kind = tokenizer["model"]["type"]
    if kind not in ("BPE", "WordPiece"):
        return f"expected a BPE or WordPiece tokenizer, got {kind}"
    if kind == "WordPiece":
        reason = _words_why_not(tokenizer)
    else:
        reason = _sentencepiece_why_not(tokenizer) if _is_sentencepiece(tokenizer) else _bytes_why_not(tokenizer)
    return reason and f"tokenizer.json: {reason}, and llama.cpp would find other tokens"


def name_for(directory: Path) -> str:
    """Return the name that a file gives its model: llama.cpp takes spaces after the special tokens of one called phi-3 for none."""
    name = directory.resolve().name
    if not _strips_spaces(_read(directory)):
        return _PHI_3.sub("phi 3", name)
    return name if _PHI_3.search(name) else f"phi-3 {name}"


def _strips_spaces(tokenizer: Mapping[str, Any]) -> bool:
    """Return whether spaces after special tokens are left out as llama.cpp does in a Phi 3."""
    added = tokenizer.get("added_tokens") or []
    known = {"</s>"} | {token["content"] for token in added}
    stripped = {token["content"] for token in added if token.get("rstrip")}
    return known >= _KEEPS_SPACE and stripped == known - _KEEPS_SPACE


def tokenizer_note(directory: Path) -> str:
    """Return what llama.cpp does otherwise where special tokens stand within a text; empty where nothing."""
    tokenizer = _read(directory)
    if _is_words(tokenizer):
        longest = tokenizer["model"]["max_input_chars_per_word"]
        return f"llama.cpp finds other tokens for Korean, vowel signs of Indian scripts, and words of more than {longest} characters"
    steps = _steps(tokenizer.get("pre_tokenizer"), "pretokenizers")
    if any(step.get("prepend_scheme") == "first" for step in steps):
        return "llama.cpp puts a space after special tokens within a text, this tokenizer does not"
    return ""


def add_tokenizer(writer: "gguf.GGUFWriter", directory: Path, vocab_size: int) -> None:
    """Write tokens, merges or scores, special tokens and the chat template."""
    tokenizer = _read(directory)
    tokens, types = _tokens(tokenizer, vocab_size)
    sentencepiece, words = _is_sentencepiece(tokenizer), _is_words(tokenizer)
    writer.add_tokenizer_model("bert" if words else "llama" if sentencepiece else "gpt2")
    writer.add_tokenizer_pre("default" if words or sentencepiece else str(_division(tokenizer)))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    if sentencepiece:
        writer.add_token_scores(_scores(tokenizer, tokens))
        writer.add_add_space_prefix(_adds_space(tokenizer))
    if not sentencepiece and not words:
        writer.add_token_merges([" ".join(merge) for merge in tokenizer["model"]["merges"]])
    special = _special(directory, vocab_size)
    # From tokenizer.json alone, as AutoTokenizer does; gguf reads other files too.
    around = _around(tokenizer) or ([], [])
    special.add_special_token = {"bos": bool(around[0]), "eos": bool(around[1])}
    ends = ("bos", "sep" if words else "eos")
    special.special_token_ids |= {kind: ids[0] for kind, ids in zip(ends, around, strict=True) if ids}
    special.add_to_gguf(writer, quiet=True)


def _read(directory: Path) -> dict[str, Any]:
    """Return the contents of tokenizer.json in the form that tokenizers writes it, whatever form they had."""
    from tokenizers import Tokenizer

    check_ids(directory / "tokenizer.json")
    found: dict[str, Any] = json.loads(Tokenizer.from_file(str(directory / "tokenizer.json")).to_str())
    return found


def _special(directory: Path, vocab_size: int) -> "gguf.SpecialVocab":
    """Return the special tokens and the chat template, as gguf finds them in the files of a tokenizer."""
    import gguf

    logging.getLogger("gguf.vocab").setLevel(logging.ERROR)  # it warns of what this file checks
    return gguf.SpecialVocab(directory, n_vocab=vocab_size)


def _is_sentencepiece(tokenizer: Mapping[str, Any]) -> bool:
    """Return whether the tokens are those of SentencePiece: spaces as ▁, unknown characters as bytes."""
    model = tokenizer["model"]
    before = _steps(tokenizer.get("pre_tokenizer"), "pretokenizers")
    spaces = _SPACE in json.dumps([tokenizer.get("normalizer"), before], ensure_ascii=False)
    return bool(model.get("byte_fallback")) and spaces and not any(step["type"] == "ByteLevel" for step in before)


def _is_words(tokenizer: Mapping[str, Any]) -> bool:
    return bool(tokenizer["model"]["type"] == "WordPiece")


def _words_why_not(tokenizer: Mapping[str, Any]) -> str | None:
    """Return why llama.cpp does not read a WordPiece tokenizer as tokenizers does."""
    model, steps = tokenizer["model"], _steps(tokenizer.get("normalizer"), "normalizers")
    lower = {"clean_text": True, "handle_chinese_chars": True, "strip_accents": True, "lowercase": True}
    as_bert = [
        step["type"] == "BertNormalizer"
        and {**step, "strip_accents": step["lowercase"] if step["strip_accents"] is None else step["strip_accents"]}
        == {"type": "BertNormalizer", **lower}
        for step in steps
    ]
    if as_bert != [True]:
        return "text is not made lower case without accents, as an uncased BERT does"
    if [step["type"] for step in _steps(tokenizer.get("pre_tokenizer"), "pretokenizers")] != ["BertPreTokenizer"]:
        return "text is not divided as BERT does"
    if model["continuing_subword_prefix"] != "##" or model["unk_token"] != "[UNK]":
        return "parts of words are not marked by ##, or unknown ones not by [UNK]"
    if [len(ids) for ids in _around(tokenizer) or ()] != [1, 1]:
        return "texts are not between two special tokens"
    return _common_why_not({**tokenizer, "model": {}})


def _common_why_not(tokenizer: Mapping[str, Any]) -> str | None:
    """Return what llama.cpp reads in no tokenizer."""
    model = tokenizer["model"]
    for option in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(option):
            return f"BPE has {option} here"
    for added in tokenizer.get("added_tokens") or []:
        for flag in ("lstrip", "rstrip", "single_word"):
            if added.get(flag) and not (flag == "rstrip" and _strips_spaces(tokenizer)):
                return f"the token {added['content']} has {flag}"
    if _around(tokenizer) is None:
        return "more than one token is put before or after a text"
    return None


def _bytes_why_not(tokenizer: Mapping[str, Any]) -> str | None:
    """Return why llama.cpp does not read a byte-level tokenizer as tokenizers does."""
    division = _division(tokenizer)
    if division is None:
        return "headfold knows no tokenizer of llama.cpp that divides text in this way"
    if any(step["type"] != "NFC" for step in _steps(tokenizer.get("normalizer"), "normalizers")):
        return "text is normalized before it is divided"
    if bool(tokenizer["model"].get("ignore_merges")) != (division in _IGNORE_MERGES):
        return f"ignore_merges is other than in llama.cpp's {division}"
    return _common_why_not(tokenizer)


def _sentencepiece_why_not(tokenizer: Mapping[str, Any]) -> str | None:
    """Return why llama.cpp does not read a tokenizer of SentencePiece's kind as tokenizers does."""
    steps = _steps(tokenizer.get("normalizer"), "normalizers")
    if any(step["type"] not in ("Prepend", "Replace") or _SPACE not in step.values() for step in steps):
        return "text is normalized before it is divided"
    for step in _steps(tokenizer.get("pre_tokenizer"), "pretokenizers"):
        if step["type"] != "Metaspace" and not (step["type"] == "Split" and step["pattern"] == {"String": " "}):
            return f"text is divided by {step['type']}"
    model = tokenizer["model"]
    vocabulary, made = model["vocab"], {"".join(merge) for merge in model["merges"]}
    added = {token["content"] for token in tokenizer.get("added_tokens") or []}
    for token in vocabulary.keys() - made - added:
        if any(token[:place] in vocabulary and token[place:] in vocabulary for place in range(1, len(token))):
            return f"no merge makes the token {token!r}"
    return _common_why_not(tokenizer)


def _around(tokenizer: Mapping[str, Any]) -> tuple[list[int], list[int]] | None:
    """Return the ids of the tokens that are put before and after a text, at most one each; None for anything else."""
    template: list[Any] = [{"Sequence": {"id": "A"}}]
    ids: Mapping[str, Any] = {}
    for step in _steps(tokenizer.get("post_processor"), "processors"):
        if step["type"] == "TemplateProcessing":
            template, ids = step["single"], step["special_tokens"]
        elif step["type"] == "BertProcessing":
            return [step["cls"][1]], [step["sep"][1]]
        elif step["type"] != "ByteLevel":
            return None
    place = next((place for place, piece in enumerate(template) if "Sequence" in piece), 0)
    # A text may stand there twice, or a token that is not listed: tokenizers reads that too.
    before, after = (
        [ids.get(piece.get("SpecialToken", {}).get("id"), {}).get("ids", []) for piece in part]
        for part in (template[:place], template[place + 1 :])
    )
    if any(len(part) > 1 or any(len(one) != 1 for one in part) for part in (before, after)):
        return None
    return [one[0] for one in before], [one[0] for one in after]


def _adds_space(tokenizer: Mapping[str, Any]) -> bool:
    """Return whether a space is put before the text."""
    for step in _steps(tokenizer.get("normalizer"), "normalizers") + _steps(
        tokenizer.get("pre_tokenizer"), "pretokenizers"
    ):
        if step.get("type") == "Prepend" or (step.get("type") == "Metaspace" and step.get("prepend_scheme") != "never"):
            return True
    return False


def _steps(node: Mapping[str, Any] | None, members: str) -> list[Mapping[str, Any]]:
    """Return the steps of a normalizer or pre-tokenizer in order."""
    if node is None:
        return []
    return (
        [step for member in node[members] for step in _steps(member, members)]
        if node.get("type") == "Sequence"
        else [node]
    )


def _division(tokenizer: Mapping[str, Any]) -> str | None:
    """Return what llama.cpp calls the division of text before merges, None for one that it does not know."""
    patterns = []
    for step in _steps(tokenizer.get("pre_tokenizer"), "pretokenizers"):
        if step.get("type") == "Digits" and step.get("individual_digits"):
            patterns.append(_DIGITS)
        elif step.get("type") == "Split" and step.get("behavior") == "Isolated" and not step.get("invert"):
            patterns.append((step.get("pattern") or {}).get("Regex", ""))
        elif step.get("type") == "ByteLevel" and not step.get("add_prefix_space"):
            patterns += [GPT_2] if step.get("use_regex", True) else []
        else:
            return None
    return DIVISIONS.get(tuple(patterns))


def _tokens(tokenizer: Mapping[str, Any], vocab_size: int) -> tuple[list[str], list[int]]:
    """Return the text and the type of every token; ids without a token are unused ones."""
    import gguf

    kinds = gguf.TokenType
    tokens = [f"[PAD{number}]" for number in range(vocab_size)]
    types = [int(kinds.UNUSED)] * vocab_size
    model = tokenizer["model"]
    for text, number in model["vocab"].items():
        if _is_words(tokenizer):  # marked where a word begins, not where it goes on
            text = text[2:] if text.startswith("##") else _SPACE + text
        if number < vocab_size:
            is_byte = bool(model.get("byte_fallback")) and len(text) == 6 and text.startswith("<0x")
            tokens[number], types[number] = text, int(kinds.BYTE if is_byte else kinds.NORMAL)
    for added in tokenizer.get("added_tokens") or []:
        number = added["id"]
        if number < vocab_size:
            tokens[number] = added["content"]
            types[number] = int(kinds.CONTROL if added.get("special") else kinds.USER_DEFINED)
            if added["content"] == model.get("unk_token"):
                types[number] = int(kinds.UNKNOWN)
    return tokens, types


def _scores(tokenizer: Mapping[str, Any], tokens: list[str]) -> list[float]:
    """Return a score per token: what is merged earlier has a higher one, so that llama.cpp merges in the same order."""
    rank: dict[str, int] = {}
    for place, merge in enumerate(tokenizer["model"]["merges"]):
        rank.setdefault("".join(merge), place)
    last = float(len(rank) + 1)
    return [-float(rank.get(token, last)) for token in tokens]
