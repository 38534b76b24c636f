"""Laws of the layouts: every one says what headfold's runtime says, in a class that needs no headfold."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from grades import assert_tight_through_float32_norms
from grouped_models import (
    CASES,
    DIM,
    DROPOUTS,
    EVEN,
    ONE,
    OTHER,
    PHI,
    SHUFFLED,
    THREE,
    UNEVEN,
    WIDTH,
    both,
    config_of,
    grouped,
    logits,
    opened,
    padded_batch,
    same,
    tokens,
)

import headfold
from headfold.core.errors import UserError
from headfold.runtime.remote import BASE
from headfold.verbs.export import export

STOCK = [
    *((name, EVEN, "PhiForCausalLM") for name in PHI),
    *((name, SHUFFLED, "PhiForCausalLM") for name in ("gpt_neox", "gptj")),
    *((name, UNEVEN, "PhiForCausalLM") for name in ("gpt_neox-odd", "gptj")),
    *((name, SHUFFLED, CASES[name].model_class) for name in ("llama", "llama-bias", "mistral", "qwen2", "qwen3", "seed_oss")),
    ("llama", UNEVEN, "MistralForCausalLM"),
    ("llama", OTHER, "LlamaForCausalLM"),
    ("llama-bias", UNEVEN, "SeedOssForCausalLM"),
    ("mistral", UNEVEN, "MistralForCausalLM"),
    ("qwen2", UNEVEN, "SeedOssForCausalLM"),
    ("qwen3", UNEVEN, "Qwen3ForCausalLM"),
    ("seed_oss", UNEVEN, "SeedOssForCausalLM"),
]  # fmt: skip
"""Case, groups of the last layer, the class that opens it."""


@pytest.mark.parametrize(("name", "groups", "model_class"), STOCK)
def test_stock_classes_say_what_the_runtime_says(
    name: str, groups: Sequence[int], model_class: str, tmp_path: Path
) -> None:
    """Chosen without being asked for, opened by transformers alone; training's dropouts stay what they were."""
    count = max(groups) + 1
    model = grouped(name, [THREE if count == 3 else EVEN, groups], tmp_path / "folded")
    result = export(tmp_path / "folded", tmp_path / "out", verify=False)
    assert result.layout == ("padded" if count == 3 else "native")
    config = config_of(tmp_path / "out")
    assert not config.keys() & {"headfold", "auto_map"} and not (tmp_path / "out" / f"{BASE}.py").exists()
    assert config["num_key_value_heads"] == count and (count == 2 or config["head_dim"] == DIM)
    stock = opened(tmp_path / "out")
    assert type(stock).__name__ == model_class and type(stock).__module__.startswith("transformers.")
    assert stock.model.layers[1].self_attn.k_proj.weight.shape == (count * DIM, WIDTH)
    same(name)(logits(stock), logits(model))
    assert {module.p for module in stock.modules() if isinstance(module, torch.nn.Dropout)} <= DROPOUTS[name]


@pytest.mark.parametrize("layout", ["per-layer", "decilm"])
@pytest.mark.parametrize("name", ["llama", "llama-bias", "mistral", "mistral-full", "qwen2", "qwen3", "seed_oss"])
def test_counts_per_layer(name: str, layout: str, tmp_path: Path) -> None:
    """Logits, also of a left-padded batch; every attention implementation; what is cached, and the text that is written."""
    if why := {"per-layer": {"seed_oss"}, "decilm": {"mistral", "qwen3"}}[layout] & {name}:
        grouped(name, [EVEN, THREE], tmp_path / "folded")
        with pytest.raises(UserError, match=f"layout {layout}: "):
            export(tmp_path / "folded", tmp_path / "out", layout=layout)
        return
    assert not why
    model, found = both(name, [SHUFFLED, THREE], tmp_path, layout)
    assert type(found).__module__.startswith("transformers_modules.")
    assert type(found)(found.config).config._attn_implementation == "sdpa"
    for implementation in ("sdpa", "eager"):
        found.set_attn_implementation(implementation)
        real = padded_batch()["attention_mask"].bool()
        assert_tight_through_float32_norms(logits(found), logits(model))
        if implementation == "sdpa":
            ours, theirs = (m(**padded_batch()).logits[real] for m in (model, found))
            assert_tight_through_float32_norms(theirs.detach(), ours.detach())
    written = [
        m.float().generate(
            **padded_batch(), num_beams=beams, max_new_tokens=5, min_new_tokens=5, return_dict_in_generate=True
        )
        for beams in (1, 2)
        for m in (model, found)
    ]
    assert written[0].sequences.tolist() == written[1].sequences.tolist()
    assert written[2].sequences.tolist() == written[3].sequences.tolist()
    assert [layer.keys.shape[1] for layer in written[1].past_key_values.layers] == [2, 3]


@pytest.mark.parametrize("name", PHI)
def test_padding_on_the_left_and_generation(name: str, tmp_path: Path) -> None:
    grouped(name, [EVEN, EVEN], tmp_path / "folded")
    export(tmp_path / "folded", tmp_path / "out", verify=False)
    written = [
        load(tmp_path / place)
        .float()
        .generate(**padded_batch(), num_beams=2, max_new_tokens=6, min_new_tokens=6, return_dict_in_generate=True)
        for place, load in (("folded", headfold.load), ("out", opened))
    ]
    assert written[0].sequences.tolist() == written[1].sequences.tolist()
    assert [layer.keys.shape[1] for layer in written[1].past_key_values.layers] == [2, 2]


ALONE = """
import copy, sys
sys.modules["headfold"] = None  # importing it raises
import torch, transformers

ids = torch.load(sys.argv[1])
for directory in sys.argv[2:]:
    for auto in ("AutoModelForCausalLM", "AutoModel"):
        def opened(path):
            return copy.deepcopy(getattr(transformers, auto).from_pretrained(path, trust_remote_code=True, dtype="auto"))
        model = opened(directory)
        model.save_pretrained(directory + auto)
        assert torch.equal(opened(directory + auto)(ids)[0], model(ids)[0])
        torch.save(model(ids)[0], f"{directory}/{auto}.pt")
"""


def test_code_beside_the_weights_stands_alone(tmp_path: Path) -> None:
    """Where there is no headfold, with and without a head, and saved again."""
    torch.save(tokens(), tmp_path / "ids.pt")
    model = grouped("llama-bias", [EVEN, THREE], tmp_path / "folded")
    places = [tmp_path / layout for layout in ("per-layer", "decilm")]
    for place in places:
        export(tmp_path / "folded", place, layout=place.name, verify=False)
    words = [sys.executable, "-c", ALONE, tmp_path / "ids.pt", *places]
    ran = subprocess.run(
        words, capture_output=True, text=True, cwd=tmp_path, env=os.environ | {"HF_HOME": str(tmp_path)}
    )
    assert ran.returncode == 0, ran.stderr
    for place in places:
        assert_tight_through_float32_norms(torch.load(place / "AutoModelForCausalLM.pt"), logits(model))
        states = model.model(tokens()).last_hidden_state
        assert_tight_through_float32_norms(torch.load(place / "AutoModel.pt"), states)


def test_the_card_names_a_reader_that_computes_something_else(tmp_path: Path) -> None:
    """OpenVINO GenAI, where layers with the same number of K/V heads differ in their query heads; with equal groups none do."""
    size = len(EVEN)
    other = tuple((*[0] * most, *[1] * (size - most)) for most in (size - 1, size - 2))
    for name, groups, named in (("unequal", other, True), ("equal", (EVEN, ONE), False)):
        grouped("llama", groups, tmp_path / name)
        said = export(tmp_path / name, tmp_path / f"{name}-out", layout="per-layer").description
        card = (tmp_path / f"{name}-out/README.md").read_text()
        assert ("paged attention of OpenVINO GenAI" in card) == named == ("OpenVINO GenAI" in said)
