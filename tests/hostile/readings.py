"""How each parser is called on a folder of whole files, one of which is corrupted."""

import json
import random
from collections.abc import Callable
from pathlib import Path

from headfold.budget.sensitivity_file import read_sensitivities, write_sensitivities
from headfold.checkpoint.cards import read_card
from headfold.checkpoint.config import read_config_file
from headfold.checkpoint.headers import read_header
from headfold.checkpoint.reader import Checkpoint
from headfold.conversion.source import open_source
from headfold.core.json_input import read_value
from headfold.core.plan import Plan
from headfold.corpus.audio import read_audio
from headfold.corpus.pairs import read_pairs
from headfold.exports.card import card_with_use
from headfold.families import family_of
from headfold.families.spec import sites
from headfold.hf_models.readers import check_ids
from headfold.llama_cpp.pooling import pooling_of
from headfold.llama_cpp.tokens import add_tokenizer, name_for, tokenizer_note, tokenizer_why_not
from headfold.reports.card import source_metadata, uptrained_card
from headfold.stats_file import StatsFile

MODELS = ("llama", "gpt2", "t5", "bert", "vit", "whisper", "clip")
MODULES = (
    "budget.sensitivity_file", "checkpoint.cards", "checkpoint.config", "checkpoint.entries", "checkpoint.headers", "checkpoint.modules",
    "checkpoint.reader", "checkpoint.refusals", "stats_file", "conversion.source", "core.files", "core.groups",
    "core.json_input", "core.plan", "core.records", "corpus.audio", "corpus.bounds", "corpus.jsonl", "corpus.lines", "corpus.pairs",
    "corpus.parquet", "corpus.rows", "exports.card", "families", "families.context", "families.spec", "hf_models.building",
    "hf_models.readers", "llama_cpp.pooling", "llama_cpp.tokens", "pages.cards", "pages.folders", "pages.results", "reports.card",
    "rotary_tables",
)  # fmt: skip
"""Where the parsers lie: whose lines an input should reach."""
ABOUT = {"model": "llama", "tokens": 256}


def json_value(folder: Path) -> object:
    return read_value(folder / "llama/config.json")


def config(folder: Path) -> object:
    found = read_config_file(folder / "llama/config.json")
    tensors = read_header(folder / "llama/model.safetensors").tensors
    return sites(family_of(found), found, tensors)


def source(name: str) -> Callable[[Path], object]:
    return lambda folder: open_source(folder / name)


def header(folder: Path) -> object:
    return read_header(folder / "llama/model.safetensors")


def index(folder: Path) -> object:
    return Checkpoint.open(folder / "sharded").fingerprint()


def plan(folder: Path) -> object:
    opened = open_source(folder / "llama")
    found = Plan.load(folder / "plan.json")
    found.check_source(opened.checkpoint.fingerprint(), opened.sites)
    return json.dumps(found.to_json(), allow_nan=False)


def statistics(folder: Path) -> object:
    found = StatsFile(folder / "stats.safetensors")
    for site in found:
        found[site], found.positions_per_dim(site)
    return found.sample()


def sensitivities(folder: Path) -> object:
    return read_sensitivities(folder / "sensitivity.json", ABOUT)


def card(folder: Path) -> object:
    text, facts = read_card(folder / "llama"), source_metadata(folder / "llama")
    return uptrained_card(card_with_use(text, "use", "all"), "llama", {"steps": "3"}), facts


def tokens(name: str, vocabulary: int) -> Callable[[Path], object]:
    def read(folder: Path) -> object:
        import gguf

        reason = tokenizer_why_not(folder / name)
        if reason is None:
            writer = gguf.GGUFWriter(None, "llama")
            add_tokenizer(writer, folder / name, vocabulary)
            name_for(folder / name), tokenizer_note(folder / name)
        return reason

    return read


def ids(folder: Path) -> object:
    return check_ids(folder / "llama/tokenizer.json")


def pooling(folder: Path) -> object:
    return pooling_of(folder / "encoder")


def rows(folder: Path) -> object:
    return read_pairs(str(folder / "pairs.jsonl"), seed=0)


def table(folder: Path) -> object:
    return read_pairs(str(folder / "pairs.parquet"), seed=0)


def parallel(folder: Path) -> object:
    return read_pairs(f"{folder}/pairs.en.gz,{folder}/pairs.de.gz", seed=0)


def sound(folder: Path) -> object:
    return read_audio(str(folder / "sounds"))


def write_sensitivities_of(root: Path) -> None:
    """Write sensitivities of the sites of the tiny Llama."""
    drawn = random.Random(0)
    measured = {site: {count: drawn.random() for count in (1, 2, 4)} for site in Plan.load(root / "plan.json").sites}
    write_sensitivities(root / "sensitivity.json", ABOUT, measured)


def write_encoder(directory: Path) -> None:
    """Write the files of a sentence-transformers model that say how its vector is made."""
    kinds = {"": "Transformer", "1_Pooling": "Pooling", "2_Normalize": "Normalize"}
    modules = [{"path": path, "type": f"sentence_transformers.models.{kind}"} for path, kind in kinds.items()]
    (directory / "1_Pooling").mkdir(parents=True)
    (directory / "modules.json").write_text(json.dumps(modules))
    modes = {f"pooling_mode_{name}": name == "mean_tokens" for name in ("cls_token", "mean_tokens", "max_tokens")}
    (directory / "1_Pooling" / "config.json").write_text(json.dumps(modes))
