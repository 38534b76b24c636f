"""What an export leaves on the disk, what it refuses, and what it says."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import pytest
import torch
import transformers
from grades import assert_bitwise
from grouped_models import CASES, EVEN, HEADS, LAYERS, ONE, THREE, UNEVEN, Case, config_of, grouped, opened
from safetensors.torch import load_file, save_file
from tiny import FOREIGN

import headfold
from headfold import cli
from headfold.checkpoint.cards import UNTOUCHED
from headfold.checkpoint.reader import Checkpoint
from headfold.core.errors import UserError
from headfold.core.groups import Groups
from headfold.core.plan import Plan, SitePlan
from headfold.exports import layout as export_layout
from headfold.exports import phi
from headfold.exports.folded import folded
from headfold.exports.layout import choose_layout, export_layouts, make_export, query_heads
from headfold.exports.rounding import Unrounded
from headfold.runtime import load
from headfold.verbs.export import export

FOLDS = {"equal": [EVEN, EVEN], "per layer": [EVEN, THREE], "unequal": [UNEVEN, UNEVEN], "one head": [ONE, ONE]}
"""Groups by layer: at least one of them fits any layout."""


RUNTIME = "headfold.runtime."
"""Where the classes of layouts are that bring their code along; `headfold.load` does not run the copy."""


@pytest.mark.parametrize("name", export_layouts())
def test_every_layout_writes_the_same_function(name: str, tmp_path: Path) -> None:
    """Whatever it can hold, of the first of our models that it has a class for; `export` compares the logits itself."""
    written = []
    case = next(
        case
        for case in CASES
        if CASES[case].config([EVEN, EVEN], "headfold").model_type in export_layouts()[name].model_types
    )
    for fold, groups in FOLDS.items():
        place = tmp_path / fold.replace(" ", "-")
        grouped(case, groups, place / "folded")
        if export_layout.why_not(folded(config_of(place / "folded")), name) is None:
            result = export(place / "folded", place / "out", layout=name)
            assert result.difference is not None and result.difference <= result.tolerance
            if "auto_map" in config_of(place / "out"):
                assert type(headfold.load(place / "out")).__module__.startswith(RUNTIME)
            written.append(fold)
    assert written, f"no fold of a {case} fits this layout"


def test_decilm_is_read_as_its_readers_do(tmp_path: Path) -> None:
    """By the arithmetic of the readers: K/V heads by the size of a group, and the width of the MLP by its multiple."""
    for width, written in ((72, 256), (256, 256), (700, 768)):
        case, place = f"mlp-{width}", tmp_path / str(width)
        CASES[case] = Case("Qwen2ForCausalLM", fields=dict(intermediate_size=width))
        try:
            grouped(case, [EVEN, ONE], place / "folded")
        finally:
            del CASES[case]
        export(place / "folded", place / "out", layout="decilm", verify=False)
        config, shapes = config_of(place / "out"), Checkpoint.open(place / "out").tensors
        assert (config["architectures"], config["model_type"]) == (["DeciLMForCausalLM"], "nemotron-nas")
        assert config["qkv_bias"] and not config["attention_bias"] and config["num_key_value_heads"] is None
        for layer, block in enumerate(config["block_configs"]):
            at = f"model.layers.{layer}"
            kv_heads = config["num_attention_heads"] // block["attention"]["n_heads_in_group"]
            assert shapes[f"{at}.self_attn.k_proj.weight"].shape[0] == kv_heads * config["head_dim"]
            assert "intermediate_size" not in block["ffn"], "some readers know ffn_mult alone"
            rows = int(2 * round(block["ffn"]["ffn_mult"], 6) * config["hidden_size"] / 3)
            assert rows + -rows % 256 == shapes[f"{at}.mlp.up_proj.weight"].shape[0] == written
            assert shapes[f"{at}.mlp.down_proj.weight"].shape[1] == config["intermediate_size"] == written
        assert [len(set(groups)) for groups in (EVEN, ONE)] == [
            HEADS // block["attention"]["n_heads_in_group"] for block in config["block_configs"]
        ]


REFUSED = [
    ("llama", [EVEN, THREE], "native", "equally many K/V heads in every layer, got 2, 3; use --layout per-layer"),
    ("llama", [EVEN, THREE], "padded", "equally many K/V heads in every layer, got 2, 3; use --layout per-layer"),
    ("gpt_neox", [EVEN, THREE], "per-layer", "gpt_neox has no class for it, expected one of llama"),
    ("gpt_neox", [EVEN, THREE], None, "has no stock layout for this fold"),
    ("gpt_neox", [EVEN, EVEN], "decilm", "gpt_neox has no class for it, expected one of llama"),
    ("llama", [EVEN, EVEN], "per-layer", "got the same everywhere; use --layout native"),
    ("llama", [EVEN, EVEN], "padded", "got equal ones, which need none; use --layout native"),
    ("llama", [UNEVEN, UNEVEN], "native", "groups of different sizes; use --layout padded"),
    ("llama", [UNEVEN, UNEVEN], "decilm", "expected equal groups, got groups of different sizes; use --layout padded"),
    ("mistral", [EVEN, THREE], "decilm", "sliding window"),
    ("llama", [EVEN, EVEN], "exl3", "layout is 'exl3', expected one of "),
    ("serial", [EVEN, EVEN], None, "has no stock layout for this fold"),
    ("serial", [EVEN, EVEN], "native", "use_parallel_residual=false"),
    ("opt", [EVEN, EVEN], "native", "opt has no class for it"),
    ("opt", [EVEN, EVEN], None, "has no stock layout for this fold"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "groups", "layout", "words"), REFUSED)
def test_what_no_class_can_be_is_refused_in_one_line(
    name: str, groups: Sequence[Sequence[int]], layout: str | None, words: str, tmp_path: Path
) -> None:
    grouped(name, groups, tmp_path / "folded")
    with pytest.raises(UserError) as refusal:
        export(tmp_path / "folded", tmp_path / "out", layout=layout)
    said = str(refusal.value)
    assert words in said and "\n" not in said
    assert layout in (None, *export_layouts()) or all(known in said for known in export_layouts())
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["folded"]


def test_choice_needs_the_config_alone() -> None:
    """Fields as `fold` writes them; what is stock already, and what is wanted as it is, stays."""
    config = CASES["llama"].config([EVEN, THREE], "sdpa").to_dict() | {"architectures": ["LlamaForCausalLM"]}
    assert choose_layout(config) == "per-layer"
    assert choose_layout(config, "headfold") is None
    native = {name: value for name, value in config.items() if name != "headfold"}
    assert choose_layout(native) is None and choose_layout(native, "decilm") == "decilm"
    assert choose_layout({"model_type": "never heard of", "headfold": {"sites": [{}]}}) is None


def test_a_class_of_a_layout_is_found_by_the_file_that_its_config_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layout's class needs no entry in the loader, and nothing but a file of the package is imported."""
    module = ModuleType("headfold.runtime.modeling_mine")
    module.MineForCausalLM = type("MineForCausalLM", (), {})
    config = {
        "architectures": ["MineForCausalLM"],
        "auto_map": {"AutoModelForCausalLM": "modeling_mine.MineForCausalLM"},
    }
    monkeypatch.setitem(sys.modules, module.__name__, module)
    assert load.own_class(config) is None
    monkeypatch.setattr(Path, "glob", lambda *_: [Path("modeling_mine.py")])
    assert load.own_class(config) is module.MineForCausalLM
    assert load.own_class({**config, "auto_map": {"AutoModelForCausalLM": "../modeling_other.MineForCausalLM"}}) is None
    assert load.own_class({**config, "architectures": ["AnotherForCausalLM"]}) is None


def test_layouts_are_files_that_declare_themselves() -> None:
    """The folder is the registry: each file's record has the file's name, and no two compete for one place."""
    pages = {path.stem for path in Path(export_layout.__file__).with_name("layouts").glob("*.py")} - {"__init__"}
    assert {name.replace("-", "_") for name in export_layouts()} == pages
    priorities = [layout.priority for layout in export_layouts().values() if layout.priority is not None]
    assert len(set(priorities)) == len(priorities)


@pytest.mark.parametrize(
    ("name", "groups", "layout"),
    [
        ("llama", [EVEN, EVEN], "native"),
        ("llama", [UNEVEN, UNEVEN], "padded"),
        ("llama", [UNEVEN, ONE], "per-layer"),
        ("llama", [EVEN, ONE], "decilm"),
        ("gptj", [UNEVEN, UNEVEN], "padded"),
    ],
)
def test_query_heads_are_those_that_are_written(
    name: str, groups: Sequence[Sequence[int]], layout: str, tmp_path: Path
) -> None:
    grouped(name, groups, tmp_path / "folded")
    counted = query_heads(config_of(tmp_path / "folded"), layout)
    export(tmp_path / "folded", tmp_path / "out", layout=layout, verify=False)
    tensors = Checkpoint.open(tmp_path / "out").tensors
    rows = [tensors[f"model.layers.{layer}.self_attn.q_proj.weight"].shape[0] for layer in range(len(groups))]
    assert rows == [count * folded(config_of(tmp_path / "folded")).entries[0].head_dim for count in counted]


def test_shards_old_buffers_and_a_kill(tmp_path: Path) -> None:
    """Old GPT-NeoX checkpoints hold masks and angles; a run that is cut goes on, to the same bytes."""
    model = grouped("gpt_neox", [EVEN, EVEN], tmp_path / "one")
    model.save_pretrained(tmp_path / "folded", max_shard_size="100KB")
    shard = max((tmp_path / "folded").glob("*.safetensors"))
    at = "gpt_neox.layers.1.attention"
    extra = {f"{at}.bias": torch.ones(1, 1, 8, 8, dtype=torch.bool), f"{at}.masked_bias": torch.tensor(-1e9)}
    extra[f"{at}.rotary_emb.inv_freq"] = torch.ones(2)
    save_file({**load_file(shard), **extra}, shard, {"format": "pt"})
    index = json.loads((tmp_path / "folded/model.safetensors.index.json").read_text())
    index["weight_map"] |= dict.fromkeys(extra, shard.name)
    (tmp_path / "folded/model.safetensors.index.json").write_text(json.dumps(index))

    def cut(stage: str, done: int, total: int) -> None:
        if stage == "write" and done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export(tmp_path / "folded", tmp_path / "again", progress=cut)
    for place in ("whole", "again"):
        export(tmp_path / "folded", tmp_path / place, verify=place == "whole")
    files = {path.name for path in (tmp_path / "whole").iterdir()}
    assert len([name for name in files if name.endswith(".safetensors")]) > 2
    assert files == {path.name for path in (tmp_path / "again").iterdir()}
    assert all((tmp_path / "whole" / name).read_bytes() == (tmp_path / "again" / name).read_bytes() for name in files)
    named = json.loads((tmp_path / "whole/model.safetensors.index.json").read_text())["weight_map"]
    assert (
        named.keys()
        == Checkpoint.open(tmp_path / "whole").tensors.keys()
        == opened(tmp_path / "whole").state_dict().keys()
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_rounds_once_more_and_is_compared_before(dtype: torch.dtype, tmp_path: Path) -> None:
    grouped("gpt_neox", [EVEN, EVEN], tmp_path / "folded", dtype)
    result = export(tmp_path / "folded", tmp_path / "out")
    assert str(dtype).removeprefix("torch.") in result.description and result.difference <= result.tolerance
    source, written = Checkpoint.open(tmp_path / "folded"), Checkpoint.open(tmp_path / "out")
    made = make_export(source, folded(source.config), "native")
    exact = Unrounded(source, made, tmp_path / "out", torch.float32)
    name = "model.layers.1.mlp.fc1.weight"
    assert {info.dtype for info in written.tensors.values()} == {dtype} and name in exact
    assert_bitwise(exact[name].to(dtype), written.read(name))
    assert not torch.equal(exact[name], written.read(name).float())
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    tensors[name][0, 0] *= 2
    save_file(tensors, tmp_path / "out" / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="expected what was computed"):
        Unrounded(source, made, tmp_path / "out", torch.float32)[name]


@pytest.mark.parametrize("layout", ["per-layer", "decilm"])
def test_exports_with_code_are_compared_too(layout: str, tmp_path: Path) -> None:
    grouped("llama", [EVEN, THREE], tmp_path / "folded")
    result = export(tmp_path / "folded", tmp_path / "out", layout=layout)
    assert result.difference is not None and result.difference <= result.tolerance


def test_logits_are_compared_in_the_dtype_that_was_asked_for(tmp_path: Path) -> None:
    grouped("gpt_neox", [EVEN, EVEN], tmp_path / "folded", torch.float32)
    plain, double = (
        export(tmp_path / "folded", tmp_path / str(dtype), device="cpu", dtype=dtype) for dtype in (None, "float64")
    )
    assert double.difference is not None and plain.tolerance is not None and double.tolerance is not None
    assert double.difference <= double.tolerance < plain.tolerance / 5
    with pytest.raises(UserError, match="--dtype bfloat16: expected float32 or float64"):
        export(tmp_path / "folded", tmp_path / "out", dtype="bfloat16")
    assert not (tmp_path / "out").exists()


def test_a_wrong_export_is_not_put_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    grouped("gptj", [EVEN, EVEN], tmp_path / "folded")
    monkeypatch.setattr(phi, "_rotary_order", lambda *_: None)
    with pytest.raises(UserError, match="got a difference of"):
        export(tmp_path / "folded", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_plan_card_and_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    grouped("gpt_neox", [EVEN, EVEN], tmp_path / "folded")
    sites = {f"layers.{layer}.self": SitePlan(Groups(EVEN), "mean", 8) for layer in range(LAYERS)}
    (tmp_path / "folded" / "plan.json").write_text(json.dumps(Plan(sites, "contiguous", "source").to_json()))
    words = ["headfold", "export", str(tmp_path / "folded"), str(tmp_path / "out"), "--layout", "native", "--json"]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as leaving:
        cli.main()
    assert not leaving.value.code
    said = json.loads(capsys.readouterr().out)
    assert (said["layout"], said["model_class"], said["num_kv_heads"]) == ("native", "PhiForCausalLM", [2, 2])
    out = tmp_path / "out"
    assert (out / "plan.json").read_bytes() == (tmp_path / "folded" / "plan.json").read_bytes()
    assert (out / "tokenizer.json").is_file()
    text = (out / "README.md").read_text()
    assert "outdated" not in text and "PhiForCausalLM" in text and "trust_remote_code" not in text
    assert text.index("# tiny") < text.index("## Use") < text.index("## Made by") and text.count("## Use") == 1
    assert type(headfold.load(out)).__name__ == "PhiForCausalLM"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", ["gpt_neox", "gptj"])
def test_folds_choose_the_stock_layout_and_say_so(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """The twin's logits in Phi, and headfold's own form where it is asked for."""
    config = FOREIGN[name].config()
    model = getattr(transformers, FOREIGN[name].model_class)(config).to(dtype)
    model.save_pretrained(tmp_path / "source")
    how = dict(kv_heads=2, group="contiguous", merge="mean", refit=False)
    result = headfold.fold(tmp_path / "source", tmp_path / "out", **how)
    assert result.verification.passed and any("layout native: PhiForCausalLM" in note for note in result.notes)
    assert type(headfold.load(tmp_path / "out")).__name__ == "PhiForCausalLM"
    assert UNTOUCHED not in (tmp_path / "out" / "README.md").read_text()
    headfold.fold(tmp_path / "source", tmp_path / "own", layout="headfold", **how)
    assert config_of(tmp_path / "own")["headfold"]
    with pytest.raises(UserError, match="layout decilm"):
        headfold.fold(tmp_path / "source", tmp_path / "refused", layout="decilm", **how)
