"""Quantised weights are decoded to what their formats' own libraries make of them; what is wrong with them is said in one line."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import one_line
from grades import assert_bitwise, assert_tight_through_float32_norms
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from headfold.checkpoint.reader import Checkpoint
from headfold.core.errors import UserError
from headfold.sources.packed import FORMATS, format_of, open_packed, settings_of

FIXTURES = sorted((Path(__file__).parent / "quantised").glob("*.safetensors"))
"""Written by `scripts/quantised_weights.py` with the formats' own libraries."""
INPUTS, OUTPUTS, GROUP = 32, 32, 8
GENERATOR = torch.Generator()
Tensors = dict[str, Tensor]
Config = dict[str, Any]


def checkpoint(path: Path, tensors: Tensors, quantisation: Config, dtype: str = "float32") -> Path:
    path.mkdir(exist_ok=True)
    config = {"model_type": "llama", "hidden_size": 8, "dtype": dtype, "quantization_config": quantisation}
    (path / "config.json").write_text(json.dumps(config))
    save_file({"norm.weight": torch.ones(3), **tensors}, path / "model.safetensors")
    return path


def decoded(path: Path) -> Tensors:
    """What the stream of a quantised checkpoint gives."""
    settings = settings_of(path)
    assert settings is not None
    page = format_of(settings)
    assert page is not None
    weights = open_packed(path, page, settings)
    found = dict(weights.tensors())
    assert (*found,) == weights.names and "quantization_config" not in weights.config and weights.quantised
    assert weights.num_bytes == sum(tensor.nbytes for tensor in found.values())
    return found


@pytest.mark.parametrize("file", FIXTURES, ids=lambda path: path.stem)
def test_what_a_library_wrote(file: Path, tmp_path: Path) -> None:
    with safe_open(file, "pt") as opened:
        quantisation = json.loads(opened.metadata()["quantization_config"])
    tensors = load_file(file)
    expected = tensors.pop("expected")
    found = decoded(checkpoint(tmp_path / "model", tensors, quantisation))
    assert {*found} == {"norm.weight", "layers.0.proj.weight"}
    assert_tight_through_float32_norms(found["layers.0.proj.weight"], expected)
    assert_bitwise(found["norm.weight"], torch.ones(3))


def drawn(low: int, high: int, *shape: int) -> Tensor:
    return torch.randint(low, high, shape, generator=GENERATOR.manual_seed(1))


def scales(*shape: int) -> Tensor:
    return torch.rand(shape, generator=GENERATOR.manual_seed(2)).half() + 0.5


def in_words(values: Tensor, bits: int, places: list[int] | None = None) -> Tensor:
    """Rows of small integers as int32 words, written bit by bit."""
    count = 32 // bits
    rows = []
    for row in values.tolist():
        words = []
        for start in range(0, len(row), count):
            word = 0
            for place, value in enumerate(row[start : start + count]):
                word |= value << bits * (places[place] if places else place)
            words.append(word - 2**32 if word >= 2**31 else word)
        rows.append(words)
    return torch.tensor(rows, dtype=torch.int32)


def gptq(
    bits: int = 4, version: str = "gptq", act_order: bool = False, group: int = GROUP
) -> tuple[Tensors, Config, Tensor]:
    """A GPTQ linear by its specification, and its weight."""
    groups = 1 if group == -1 else INPUTS // group
    integers, zeros = drawn(0, 2**bits, INPUTS, OUTPUTS), drawn(1, 2**bits, groups, OUTPUTS)
    scale = scales(groups, OUTPUTS)
    order = torch.arange(INPUTS) // (INPUTS if group == -1 else group)
    if act_order:
        order = order[torch.randperm(INPUTS, generator=GENERATOR.manual_seed(3))]
    stored = zeros - int(version == "gptq")
    tensors = {
        "a.qweight": in_words(integers.T, bits).T.contiguous(), "a.qzeros": in_words(stored, bits),
        "a.scales": scale, "a.g_idx": order.int(),
    }  # fmt: skip
    config = {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group,
        "desc_act": act_order,
        "checkpoint_format": version,
    }
    return tensors, config, (scale.float()[order] * (integers - zeros[order])).T


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("act_order", [False, True])
def test_gptq(bits: int, version: str, act_order: bool, tmp_path: Path) -> None:
    tensors, config, expected = gptq(bits, version, act_order)
    assert_bitwise(decoded(checkpoint(tmp_path / "m", tensors, config))["a.weight"], expected.contiguous())


def test_gptq_without_groups_and_with_settings_beside_the_config(tmp_path: Path) -> None:
    tensors, config, expected = gptq(group=-1)
    del tensors["a.g_idx"]
    path = checkpoint(tmp_path / "m", tensors, {})
    (path / "quantize_config.json").write_text(json.dumps(config))
    assert_bitwise(decoded(path)["a.weight"], expected.contiguous())
    save_file({"a.weight": expected.contiguous()}, path / "model.safetensors")
    assert settings_of(path) is None  # a file that was left beside weights that are none of GPTQ


def test_gptq_with_bits_of_their_own(tmp_path: Path) -> None:
    """Modules that `dynamic` names have other bits; what they have their shapes say."""
    (few, config, four), (many, _, eight) = gptq(4), gptq(8)
    both = few | {name.replace("a.", "b."): tensor for name, tensor in many.items()}
    found = decoded(checkpoint(tmp_path / "m", both, config | {"dynamic": {"+:b": {"bits": 8}}}))
    assert_bitwise(found["a.weight"], four.contiguous())
    assert_bitwise(found["b.weight"], eight.contiguous())


def awq() -> tuple[Tensors, Config, Tensor]:
    """An AWQ linear by its specification: eight neighbours lie in a word in the order 0 2 4 6 1 3 5 7."""
    places = [0, 4, 1, 5, 2, 6, 3, 7]
    groups = INPUTS // GROUP
    integers, zeros, scale = drawn(0, 16, INPUTS, OUTPUTS), drawn(0, 16, groups, OUTPUTS), scales(groups, OUTPUTS)
    tensors = {"a.qweight": in_words(integers, 4, places), "a.qzeros": in_words(zeros, 4, places), "a.scales": scale}
    wide = [each.repeat_interleave(GROUP, 0) for each in (scale.float(), zeros)]
    config = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm", "zero_point": True}
    return tensors, config, (wide[0] * (integers - wide[1])).T


def test_awq(tmp_path: Path) -> None:
    tensors, config, expected = awq()
    assert_bitwise(decoded(checkpoint(tmp_path / "m", tensors, config))["a.weight"], expected.contiguous())


def float8(*shape: int) -> Tensor:
    return torch.randn(shape, generator=GENERATOR.manual_seed(4)).to(torch.float8_e4m3fn)


@pytest.mark.parametrize(
    ("ending", "scale", "wide"),
    [
        ("_scale", scales(1).float(), lambda scale: scale),
        ("_scale", scales(10, 1).float(), lambda scale: scale),
        ("_scale_inv", scales(3, 2).float(), lambda scale: scale.repeat_interleave(4, 0)[:10].repeat_interleave(8, 1)[:, :12]),
    ],
    ids=["tensor", "row", "block"],
)  # fmt: skip
def test_float8(ending: str, scale: Tensor, wide: Callable[[Tensor], Tensor], tmp_path: Path) -> None:
    packed = float8(10, 12)
    tensors = {"a.weight": packed, f"a.weight{ending}": scale, "a.input_scale": torch.ones(1), "a.bias": torch.ones(10)}
    config = {"quant_method": "fp8", "weight_block_size": [4, 8]}
    found = decoded(checkpoint(tmp_path / "m", tensors, config))
    assert {*found} == {"norm.weight", "a.weight", "a.bias"}
    assert_bitwise(found["a.weight"], packed.float() * wide(scale))


def test_float8_experts_in_one_tensor(tmp_path: Path) -> None:
    packed, scale = float8(2, 8, 8), scales(2, 2, 1).float()
    found = decoded(
        checkpoint(
            tmp_path / "m",
            {"e.up": packed, "e.up_scale_inv": scale},
            {"quant_method": "fp8", "weight_block_size": [4, 8]},
        )
    )
    assert_bitwise(found["e.up"], packed.float() * scale.repeat_interleave(4, 1).repeat_interleave(8, 2))


def test_mxfp4_as_transformers_decodes_it(tmp_path: Path) -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    blocks = drawn(0, 256, 2, 6, 3, 16).to(torch.uint8)
    powers = drawn(120, 134, 2, 6, 3).to(torch.uint8)
    path = checkpoint(
        tmp_path / "m", {"e.up_blocks": blocks, "e.up_scales": powers, "e.up_bias": torch.ones(2, 6)},
        {"quant_method": "mxfp4", "modules_to_not_convert": []}, "bfloat16",
    )  # fmt: skip
    found = decoded(path)
    assert {*found} == {"norm.weight", "e.up", "e.up_bias"}
    assert_bitwise(found["e.up"], convert_moe_packed_tensors(blocks, powers).contiguous())


def nan(tensor: Tensor) -> Tensor:
    spoilt = tensor.clone()
    spoilt.view(-1)[0] = float("nan")
    return spoilt


BAD: dict[str, tuple[Callable[[], tuple[Tensors, Config]], list[str]]] = {
    "gptq without its group size": (lambda: _without(gptq(), "group_size"), ["config.json", "group_size", "got none"]),
    "gptq of three bits": (lambda: _with(gptq(), bits=3), ["bits", "2, 4 or 8", "got 3"]),
    "gptq of another packing": (lambda: _with(gptq(), checkpoint_format="marlin"), ["checkpoint_format", "marlin"]),
    "scales of another shape": (lambda: _spoilt(gptq(), "a.scales", lambda t: t[1:]), ["a.weight: scales", "(4, 32)", "(3, 32)"]),
    "zeros of another shape": (lambda: _spoilt(gptq(), "a.qzeros", lambda t: t[:, 1:]), ["qzeros", "(4, 4)", "(4, 3)"]),
    "groups that are not there": (lambda: _spoilt(gptq(), "a.g_idx", lambda t: t + 9), ["g_idx", "0 to 3"]),
    "nan scales": (lambda: _spoilt(gptq(), "a.scales", nan), ["a.weight", "8 of 1024", "NaN"]),
    "no scales": (lambda: _lacking(gptq(), "a.scales"), ["a.weight", "scales", "got none"]),
    "words of another dtype": (lambda: _spoilt(gptq(), "a.qweight", lambda t: t.long()), ["qweight", "int32", "int64"]),
    "awq of another layout": (lambda: _with(awq(), version="gemv"), ["version", "gemm", "gemv"]),
    "awq scales of another shape": (lambda: _spoilt(awq(), "a.scales", lambda t: t[:, :8]), ["scales", "(4, 32)", "(4, 8)"]),
    "float8 without scales": (lambda: ({"a.weight": float8(4, 4)}, {"quant_method": "fp8"}), ["scales", "a.weight"]),
    "float8 scales of another shape": (
        lambda: ({"a.weight": float8(4, 4), "a.weight_scale_inv": torch.ones(3, 1)},
            {"quant_method": "fp8", "weight_block_size": [2, 2]}), ["(2, 2)", "(3, 1)"],
    ),
    "float8 blocks of one size": (
        lambda: ({"a.weight": float8(4, 4)}, {"quant_method": "fp8", "weight_block_size": [128]}), ["weight_block_size", "[128]"],
    ),
    "no packed weights": (lambda: ({"a.weight": torch.ones(2, 2)}, {"quant_method": "fp8"}), ["config.json", "got none"]),
    "mxfp4 without scales": (
        lambda: ({"e_blocks": torch.zeros(1, 2, 1, 16, dtype=torch.uint8)}, {"quant_method": "mxfp4"}), ["scales", "got none"],
    ),
    "a sparse format": (
        lambda: ({}, {"quant_method": "compressed-tensors", "format": "sparse-24-bitmask"}), ["format", "sparse-24-bitmask"],
    ),
    "bitsandbytes of neither kind": (lambda: ({}, {"quant_method": "bitsandbytes"}), ["load_in_4bit", "neither"]),
}  # fmt: skip


def _with(made: tuple[Tensors, Config, Tensor], **fields: Any) -> tuple[Tensors, Config]:
    return made[0], made[1] | fields


def _without(made: tuple[Tensors, Config, Tensor], field: str) -> tuple[Tensors, Config]:
    return made[0], {name: value for name, value in made[1].items() if name != field}


def _lacking(made: tuple[Tensors, Config, Tensor], name: str) -> tuple[Tensors, Config]:
    return {other: tensor for other, tensor in made[0].items() if other != name}, made[1]


def _spoilt(
    made: tuple[Tensors, Config, Tensor], name: str, change: Callable[[Tensor], Tensor]
) -> tuple[Tensors, Config]:
    return made[0] | {name: change(made[0][name]).contiguous()}, made[1]


@pytest.mark.parametrize("case", BAD)
def test_bad_weights_are_refused_in_one_line(case: str, tmp_path: Path) -> None:
    make, words = BAD[case]
    path = checkpoint(tmp_path / "model", *make())
    with pytest.raises(UserError) as error:
        decoded(path)
    one_line(error, *words)


@pytest.mark.parametrize(
    "state", [b"{", b'{"shape": [4, 4]}', b'{"shape": [1e9], "blocksize": 64}', b'{"shape": [-1, 4]}']
)
def test_bad_states_of_bitsandbytes_are_refused(state: bytes, tmp_path: Path) -> None:
    file = next(path for path in FIXTURES if path.stem == "bitsandbytes-nf4")
    tensors = load_file(file)
    (name,) = (name for name in tensors if "quant_state" in name)
    tensors[name] = torch.frombuffer(bytearray(state), dtype=torch.uint8)
    del tensors["expected"]
    path = checkpoint(tmp_path / "model", tensors, {"quant_method": "bitsandbytes", "load_in_4bit": True})
    with pytest.raises(UserError) as error:
        decoded(path)
    one_line(error, "layers.0.proj.weight")


def test_unknown_methods_are_refused_as_before(tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "model", {}, {"quant_method": "quanto"})
    settings = settings_of(path)
    assert settings is not None and format_of(settings) is None
    with pytest.raises(UserError) as error:
        Checkpoint.open(path)
    one_line(error, "quantised (quanto)")


def test_the_documentation_lists_every_format() -> None:
    page = (Path(__file__).parents[1] / "docs" / "how-to" / "sources.md").read_text()
    table = page[page.index("## Quantised weights") :].split("\n\n")[1].splitlines()[2:]
    assert table == [f"| {each.title} | `{each.method}` | {each.checked_against} |" for each in FORMATS]


def test_every_format_is_tested() -> None:
    """By a file that its library wrote, or by an encoder above."""
    from_libraries = {re.split(r"-(?:nf4|fp4|int|float)", path.stem)[0] for path in FIXTURES}
    for page in FORMATS:
        written = "wrote" in page.checked_against
        assert written == (page.method in from_libraries), page.method
