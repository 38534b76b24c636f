"""Tiny random models for a campaign, each with a card and with what reads its inputs."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from tiny import _CLIP_TEXT, FOREIGN, randomise, tiny_checkpoint

MODELS = ("llama", "gpt2", "t5", "bert", "vit", "whisper", "clip", "wordpiece")
"""By name. `wordpiece` is a BERT whose vocabulary is a text, vocab.txt, without a tokenizer.json."""
VOCABULARY = 260
"""Four special tokens and all bytes."""
CARD = "---\nlicense: apache-2.0\ntags:\n- tiny\nlanguage: en\n---\n# A tiny model\n\nIt is random.\n"
_RATE, _FRAMES = 8000, 22
"""Of sound: samples per second, and frames in a window of a second."""
_FORMS = {"no_timestamps_token_id": 200, "prev_sot_token_id": 3}
"""What a Whisper's generation config says of the forms in which it writes."""


def write_model(root: Path, name: str) -> None:
    """Write a model of `MODELS` to a directory of its name."""
    import transformers

    out = root / name
    if name == "clip":
        _write_clip(out)
    else:
        sizes: dict[str, Any] = {} if name == "vit" else {"vocab_size": VOCABULARY}
        shutil.copytree(tiny_checkpoint(name.replace("wordpiece", "bert"), torch.float32, **sizes), out)
    (out / "README.md").write_text(CARD)
    (out / "LICENSE").write_text("none\n")
    if name in ("vit", "clip"):
        transformers.ViTImageProcessor(size={"height": 12, "width": 12}).save_pretrained(out)
    if name == "whisper":
        hop = _RATE // _FRAMES
        transformers.WhisperFeatureExtractor(
            feature_size=6, sampling_rate=_RATE, hop_length=hop, chunk_length=1
        ).save_pretrained(out)
        generation = json.loads((out / "generation_config.json").read_text()) | _FORMS
        (out / "generation_config.json").write_text(json.dumps(generation, indent=2))
    if name == "wordpiece":
        _write_words(out)
    elif name != "vit":
        _write_letters(out)


def shard(source: Path, out: Path) -> None:
    """Write a checkpoint in bfloat16 as three shards with an index, the K and V of a layer in different ones."""
    from safetensors.torch import load_file, save_file

    tensors = {name: tensor.bfloat16() for name, tensor in load_file(source / "model.safetensors").items()}
    shutil.copytree(source, out)
    (out / "model.safetensors").unlink()
    config = json.loads((out / "config.json").read_text()) | {"dtype": "bfloat16"}
    (out / "config.json").write_text(json.dumps(config, indent=2))
    shards = {name: f"model-{1 + number % 3:05d}-of-00003.safetensors" for number, name in enumerate(sorted(tensors))}
    for file in sorted(set(shards.values())):
        save_file({name: tensors[name] for name in tensors if shards[name] == file}, out / file, {"format": "pt"})
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": shards}
    (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def _write_clip(out: Path) -> None:
    import transformers

    config = FOREIGN["clip"].config(text_config=_CLIP_TEXT | {"vocab_size": VOCABULARY})
    model = transformers.CLIPModel._from_config(config, dtype=torch.float32)
    randomise(model, 0)
    model.save_pretrained(out)


def _write_letters(out: Path) -> None:
    """Save a tokenizer of which every byte is a token."""
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = ["<pad>", "<s>", "</s>", "<mask>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({letter: number for number, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    marks = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "mask_token": "<mask>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **marks).save_pretrained(out)


def _words() -> list[str]:
    """Return the vocabulary of the tokenizers of words and parts of words."""
    letters = [chr(number) for number in range(ord("a"), ord("z") + 1)]
    whole = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "dog", "fox", "quick", ",", ".", *"0123456789"]
    return [*whole, *letters, *(f"##{letter}" for letter in letters)]


def _write_words(out: Path) -> None:
    """Save a BERT's tokenizer as its first checkpoints had it: a word, or a part of one, in every line of vocab.txt."""
    (out / "vocab.txt").write_text("".join(f"{word}\n" for word in _words()))
    settings = {"tokenizer_class": "BertTokenizer", "do_lower_case": True, "model_max_length": 32}
    (out / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))


def write_parts_of_words(out: Path) -> None:
    """Save the same tokenizer as tokenizer.json."""
    import transformers
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    words = _words()
    made = Tokenizer(models.WordPiece({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    made.normalizer, made.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[(mark, words.index(mark)) for mark in ("[CLS]", "[SEP]")]
    )
    marks = {f"{name}_token": f"[{name.upper()}]" for name in ("unk", "pad", "cls", "sep", "mask")}
    transformers.PreTrainedTokenizerFast(tokenizer_object=made, **marks).save_pretrained(out)
