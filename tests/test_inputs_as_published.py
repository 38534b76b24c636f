"""Models are folded by the command line on data that the tokenizers and processors of their published checkpoints read."""

import importlib.util
import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import one_line
from grades import assert_differs, assert_tight_through_float32_norms
from test_cli import run  # noqa: F401 (a fixture)
from tiny import FOREIGN, answer_of, tiny_checkpoint
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoProcessor,
    AutoTokenizer,
    EsmTokenizer,
    NllbTokenizer,
    PreTrainedTokenizerFast,
    SiglipImageProcessorPil,
    SiglipProcessor,
    ViTImageProcessorPil,
)

import headfold
from headfold.core.errors import UserError
from headfold.corpus.samples import draw_sample
from headfold.corpus.sentences import read_sentences
from headfold.evaluate.translation import generate_texts
from headfold.hf_models.building import library_errors

PIL = pytest.importorskip("PIL.Image")
RESIDUES = "LAGVSERTIDPKQNFYMHWC"


def same_as_stock(out: Path, auto: Any, original: Path, sample: dict[str, Any]) -> None:
    """The fold runs in headfold's runtime and under transformers alike, and is another model than the original."""
    ours = answer_of(headfold.load(out), sample)
    stock = auto.from_pretrained(out, trust_remote_code=True).eval()
    assert_tight_through_float32_norms(answer_of(stock, sample), ours)
    assert_differs(answer_of(auto.from_pretrained(original).eval(), sample).double(), ours.double())


@pytest.fixture
def esm(tmp_path: Path) -> Path:
    """A tiny ESM-2 with its own alphabet."""
    path, alphabet = tmp_path / "esm", tmp_path / "vocab.txt"
    alphabet.write_text("\n".join(["<cls>", "<pad>", "<eos>", "<unk>", *RESIDUES, *"XBUZO.-", "<null_1>", "<mask>"]))
    ids = {
        "vocab_size": 33,
        "pad_token_id": 1,
        "mask_token_id": 32,
        "token_dropout": True,
        "emb_layer_norm_before": False,
    }
    shutil.copytree(tiny_checkpoint("esm", torch.float32, **ids), path)
    EsmTokenizer(str(alphabet), model_max_length=32).save_pretrained(path)
    return path


def fasta(path: Path, count: int = 60, line: int = 12) -> list[str]:
    """Write proteins as databases do, in lines; return them."""
    draw = random.Random(0)
    proteins = ["".join(draw.choices(RESIDUES, k=draw.randint(5, 40))) for _ in range(count)]
    blocks = [
        f">sp|P{number:05}|NAME Some protein OS=Homo sapiens\n"
        + "\n".join(protein[at : at + line] for at in range(0, len(protein), line))
        for number, protein in enumerate(proteins)
    ]
    path.write_text("\n\n".join(blocks) + "*\n")
    return proteins


def test_esm_is_calibrated_on_the_sequences_of_a_fasta_file(run: Any, esm: Path, tmp_path: Path) -> None:  # noqa: F811
    data, out = tmp_path / "proteins.fasta", tmp_path / "out"
    proteins = fasta(data)
    sample = draw_sample("sentences", str(data), path=esm, num_items=None, context=30, seed=None)
    assert len(sample["input_ids"]) == len(proteins)
    unknown, (beginning, end) = 3, (0, 2)
    assert not (sample["input_ids"] == unknown).any() and (sample["input_ids"][:, 0] == beginning).all()
    first = sample["input_ids"][0][sample["attention_mask"][0] != 0].tolist()
    assert first == [beginning, *(4 + RESIDUES.index(one) for one in proteins[0][:28]), end]
    ran = run("fold", esm, out, "--kv-heads", "4", "--calibration", data, "--context", "30")
    assert ran.code == 0 and "verified" in ran.out, ran.err
    assert {"vocab.txt", "tokenizer_config.json"} <= {file.name for file in out.iterdir()}
    masked = sample["input_ids"].clone()
    masked[:, 2] = 32
    same_as_stock(out, AutoModelForMaskedLM, esm, sample | {"input_ids": masked})
    ran = run("eval", out, "--reference", esm, "--text", data, "--json")
    assert ran.code == 0 and json.loads(ran.out)["num_items"] == len(proteins)


def test_fasta_files_are_read_by_sequence(tmp_path: Path) -> None:
    file = tmp_path / "few.faa"
    file.write_text(">one\nMK TA\n\n>empty\n>two\nLL\r\nGG*\n")
    assert read_sentences(str(file)) == (["MK TA", "LLGG"], None)
    assert read_sentences(str(file), num_items=1, seed=0)[0][0] in ("MK TA", "LLGG")
    file.write_text("MKTA\n>one\nLL\n")
    with pytest.raises(UserError) as error:
        read_sentences(str(file))
    one_line(error, file, "a line that begins with >", "'MKTA'")
    (tmp_path / "lines.txt").write_text("MKTA\nLL\n")
    assert read_sentences(str(tmp_path / "lines.txt"))[0] == ["MKTA", "LL"]


def test_sentences_that_the_tokenizer_does_not_know_are_said(run: Any, esm: Path, tmp_path: Path) -> None:  # noqa: F811
    """Calibration would see one token throughout, in silence."""
    data = tmp_path / "lower.txt"
    data.write_text("mktayiakqr\n" * 20)
    ran = run("fold", esm, tmp_path / "out", "--kv-heads", "4", "--calibration", data)
    assert ran.code == 0 and f"{data}: 100% of the tokens are unknown to the tokenizer" in ran.out + ran.err


ENGLISH = ["a man is running", "two dogs play", "a red car", "the child reads a book", "a woman is singing"] * 6
GERMAN = ["ein mann rennt", "zwei hunde spielen", "ein rotes auto", "das kind liest ein buch", "eine frau singt"] * 6


@pytest.fixture
def nllb(tmp_path: Path) -> tuple[Path, str]:
    """A tiny M2M100 with a tokenizer of NLLB, whose files name no target language, as those published; and pairs of text."""
    pieces = Tokenizer(models.BPE(unk_token="<unk>"))
    pieces.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    pieces.train_from_iterator(
        ENGLISH + GERMAN, trainers.BpeTrainer(vocab_size=90, special_tokens=special, show_progress=False)
    )
    model = json.loads(pieces.to_str())["model"]
    tokenizer = NllbTokenizer(
        vocab=model["vocab"], merges=[tuple(pair) for pair in model["merges"]], src_lang="eng_Latn"
    )
    ids = {
        "vocab_size": len(tokenizer),
        "bos_token_id": 0,
        "pad_token_id": 1,
        "eos_token_id": 2,
        "decoder_start_token_id": 2,
    }
    path = tmp_path / "nllb"
    shutil.copytree(tiny_checkpoint("m2m_100", torch.float32, **ids), path)
    tokenizer.save_pretrained(path)
    for name, lines in (("en.txt", ENGLISH), ("de.txt", GERMAN)):
        (tmp_path / name).write_text("\n".join(lines))
    return path, f"{tmp_path / 'en.txt'},{tmp_path / 'de.txt'}"


def test_nllb_reads_and_writes_the_languages_that_columns_name(
    run: Any,  # noqa: F811
    nllb: tuple[Path, str],
    tmp_path: Path,
) -> None:
    (model, pairs), out = nllb, tmp_path / "out"
    words = ("--kv-heads", "4", "--calibration", pairs)
    ran = run("fold", model, out, *words)
    assert ran.code == 2 and "got no tgt_lang" in ran.err and "--columns, such as eng_Latn,deu_Latn" in ran.err
    columns = ("--columns", "fra_Latn,deu_Latn")
    ran = run("fold", model, out, *words, *columns)
    assert ran.code == 0 and "verified" in ran.out, ran.err
    tokenizer = AutoTokenizer.from_pretrained(out)
    french, german = tokenizer.convert_tokens_to_ids(["fra_Latn", "deu_Latn"])
    sample = draw_sample("pairs", pairs, path=out, num_items=4, context=32, seed=None, columns=("fra_Latn", "deu_Latn"))
    assert (sample["input_ids"][:, 0] == french).all() and (sample["labels"][:, 0] == german).all()
    same_as_stock(out, AutoModelForSeq2SeqLM, model, sample)
    ran = run("eval", out, "--reference", model, "--text", pairs, *columns, "--max-new-tokens", "4", "--json")
    assert ran.code == 0 and json.loads(ran.out)["bleu"] is not None, ran.err


def test_outputs_begin_with_the_target_language(nllb: tuple[Path, str]) -> None:
    """As `forced_bos_token_id`, which the published generation config leaves to the caller; not where the decoder starts from it."""
    tokenizer, model = AutoTokenizer.from_pretrained(nllb[0], tgt_lang="deu_Latn"), headfold.load(nllb[0])
    written, forced, generate = [], [], type(model).generate

    def watched(self: Any, **options: Any) -> torch.Tensor:
        forced.append(options.get("forced_bos_token_id"))
        written.append(generate(self, **options))
        return written[-1]

    german = tokenizer.convert_tokens_to_ids("deu_Latn")
    sample = draw_sample(
        "pairs", nllb[1], path=nllb[0], num_items=3, context=32, seed=None, columns=("eng_Latn", "deu_Latn")
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(model), "generate", watched)
        generate_texts(model, sample, tokenizer, max_new_tokens=3)
        model.generation_config.decoder_start_token_id = german
        generate_texts(model, sample, tokenizer, max_new_tokens=3)
    assert forced == [german, None] and (written[0][:, 1] == german).all() and (written[1][:, 0] == german).all()


def test_samples_of_a_page_are_of_the_languages_that_columns_name(nllb: tuple[Path, str], tmp_path: Path) -> None:
    """Of pairs of text, and of prompts; other columns than languages have no meaning beside prompts."""
    pytest.importorskip("markupsafe")
    (model, pairs), fold, shown = nllb, tmp_path / "fold", []
    headfold.fold(model, fold, kv_heads=4, merge="mean", group="contiguous", refit=False, verify=False)
    languages = ["eng_Latn", "deu_Latn"]
    for number, source in enumerate([{"text": pairs}, {"prompts": ENGLISH[:3]}]):
        out = tmp_path / f"{number}.html"
        headfold.report(fold, out=out, original=model, columns=languages, new_tokens=2, **source)
        shown.append(out.read_text())
    assert all(ENGLISH[2] in page for page in shown)
    with pytest.raises(UserError, match="expected the two languages of the prompts as"):
        headfold.report(
            fold, out=tmp_path / "no.html", original=model, prompts=["a"], columns=["en", "de"], new_tokens=2
        )


def pictures(folder: Path, count: int = 24) -> list[Path]:
    folder.mkdir()
    draw = random.Random(0)
    for number in range(count):
        picture = PIL.new("RGB", (20, 16), (draw.randrange(255), 90, 90))
        picture.paste((20, draw.randrange(255), 20), (number % 5, 2, 6 + number % 7, 9))
        picture.save(folder / f"{number:02}.png")
    return sorted(folder.iterdir())


def test_siglip_folds_with_its_processor(run: Any, tmp_path: Path) -> None:  # noqa: F811
    words = ["<unk>", "</s>", "a", "photo", "of", "the", "cat", "dog", "red", "bird"]
    core = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, "<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", pad_token="</s>", eos_token="</s>", model_max_length=32
    )
    model, out, table = tmp_path / "siglip", tmp_path / "out", tmp_path / "captions.jsonl"
    shutil.copytree(tiny_checkpoint("siglip", torch.float32), model)
    SiglipProcessor(SiglipImageProcessorPil(size={"height": 12, "width": 12}), tokenizer).save_pretrained(model)
    assert not (model / "preprocessor_config.json").exists()  # transformers 5 writes one file for both
    rows = [
        {"image": str(file), "text": f"a photo of the {words[6 + at % 4]}"}
        for at, file in enumerate(pictures(tmp_path / "images"))
    ]
    table.write_text("\n".join(map(json.dumps, rows)))
    ran = run("fold", model, out, "--kv-heads", "1/2", "--calibration", table, "--columns", "image,text")
    assert ran.code == 0 and "verified" in ran.out, ran.err
    with PIL.open(rows[0]["image"]) as picture:
        sample = dict(AutoProcessor.from_pretrained(out)(
            images=[picture] * 2, text=["a red cat", "a dog"], padding="max_length", return_tensors="pt"
        ))  # fmt: skip
    assert sample["input_ids"].shape == (2, FOREIGN["siglip"].fields["text_config"]["max_position_embeddings"])
    same_as_stock(out, AutoModel, model, {name: sample[name] for name in ("input_ids", "pixel_values")})
    ran = run("eval", out, "--reference", model, "--text", table, "--columns", "image,text", "--json")
    assert ran.code == 0 and json.loads(ran.out)["pooling"] == "projected", ran.err


def test_dinov3_folds_on_images_or_names_the_package_that_it_needs(run: Any, tmp_path: Path) -> None:  # noqa: F811
    """Its own processor runs on torchvision alone, in whatever transformers; a ViT's does the same but for the order of two steps."""
    model, out, images = tmp_path / "dinov3", tmp_path / "out", tmp_path / "images"
    shutil.copytree(tiny_checkpoint("dinov3_vit", torch.float32), model)
    pictures(images)
    processor = ViTImageProcessorPil(size={"height": 12, "width": 12})
    processor.save_pretrained(model)
    words = ("fold", model, out, "--kv-heads", "1/2", "--calibration", images)
    published = json.loads((model / "preprocessor_config.json").read_text())
    if importlib.util.find_spec("torchvision") is None:
        file = model / "preprocessor_config.json"
        file.write_text(json.dumps(published | {"image_processor_type": "DINOv3ViTImageProcessorFast"}))
        ran = run(*words)
        expected = (
            "expected the package torchvision, which DINOv3ViTImageProcessor needs, got none; pip install torchvision"
        )
        assert ran.code == 2 and ran.err.splitlines()[-1] == f"headfold: {model}: {expected}"
        file.write_text(json.dumps(published))
    ran = run(*words)
    assert ran.code == 0 and "verified" in ran.out, ran.err
    sample = draw_sample("images", str(images), path=out, num_items=4, context=0, seed=None)
    same_as_stock(out, AutoModel, model, sample)


@pytest.mark.parametrize(
    ("named", "package"), [("SentencePiece", "sentencepiece"), ("PIL", "pillow"), ("mistral-common", "mistral-common")]
)
def test_a_package_that_transformers_misses_is_named(named: str, package: str) -> None:
    with pytest.raises(UserError) as error, library_errors("a/model", "the tokenizer does not load"):
        raise ImportError(
            f"\nSomeTokenizer requires the {named} library but it was not found in your environment. See the page "
            + "x" * 400
        )
    assert (
        str(error.value)
        == f"a/model: expected the package {package}, which SomeTokenizer needs, got none; pip install {package}"
    )
