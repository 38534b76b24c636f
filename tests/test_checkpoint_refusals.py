"""What cannot be a source is refused in one line that says where, expected, got and what to do."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoints import FLOATS, SHARDS, by_layer, cut, one_line, save, spoil_header, weights
from safetensors.torch import load_file, save_file
from torch import Tensor

from headfold.checkpoint.reader import Checkpoint, check_finite, refuse_remote_code, resolve
from headfold.core.errors import UserError


def _without_config(path: Path) -> None:
    (path / "config.json").unlink()


def _torn_config(path: Path) -> None:
    (path / "config.json").write_text('{"model_type": ')


def _list_config(path: Path) -> None:
    (path / "config.json").write_text("[1]")


def _config(**fields: object) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        (path / "config.json").write_text(json.dumps({"model_type": "llama", **fields}))

    return change


def _pickled(path: Path) -> None:
    _without_weights(path)
    (path / "pytorch_model.bin").write_bytes(b"pickle")


def _without_weights(path: Path) -> None:
    for file in path.glob("model*"):
        file.unlink()


def _adapter(path: Path) -> None:
    _without_weights(path)
    (path / "config.json").unlink()
    (path / "adapter_config.json").write_text("{}")
    save_file({"lora_A": torch.ones(2)}, path / "adapter_model.safetensors")


def _without_index(path: Path) -> None:
    (path / "model.safetensors.index.json").unlink()


def _empty(path: Path) -> None:
    shutil.rmtree(path)
    path.mkdir()


def _nothing(path: Path) -> None:
    shutil.rmtree(path)


def _missing_shard(path: Path) -> None:
    (path / SHARDS[1]).unlink()


def _index(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        file = path / "model.safetensors.index.json"
        index = json.loads(file.read_text())
        change(index)
        file.write_text(json.dumps(index))

    return apply


def _header(change: Callable[[dict], object]) -> Callable[[Path], None]:
    return lambda path: spoil_header(path / SHARDS[0], change)


def _bytes_at(offset: int, junk: bytes) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        data = bytearray((path / SHARDS[0]).read_bytes())
        data[offset : offset + len(junk)] = junk
        (path / SHARDS[0]).write_bytes(data)

    return apply


def _add(name: str, tensor: Tensor, shard: str) -> Callable[[Path], None]:
    return lambda path: save_file(load_file(path / shard) | {name: tensor}, path / shard)


def _longer(path: Path) -> None:
    with (path / SHARDS[0]).open("ab") as file:
        file.write(b"12345678")


REFUSED = {
    "nothing": (_nothing, ["nothing there"]),
    "empty": (_empty, ["empty"]),
    "no config": (_without_config, ["no config.json"]),
    "torn config": (_torn_config, ["config.json", "not valid JSON"]),
    "list as config": (_list_config, ["config.json", "list"]),
    "no weights": (_without_weights, ["no weights"]),
    "pickled": (_pickled, ["pytorch_model.bin", "save_pretrained", "safe_serialization"]),
    "adapter": (_adapter, ["adapter", "merge"]),
    "no index": (_without_index, ["index", SHARDS[0]]),
    "missing shard": (_missing_shard, [SHARDS[1], "missing"]),
    "absent tensor": (_index(lambda index: index["weight_map"].update(ghost=SHARDS[0])), ["ghost", "missing"]),
    "no weight_map": (_index(lambda index: index.pop("weight_map")), ["weight_map"]),
    "shard elsewhere": (_index(lambda index: index["weight_map"].update(ghost="../x.safetensors")), ["../x.safetensors"]),
    "tensor twice": (_add("layers.1.k.weight", torch.ones(8, 8), SHARDS[0]), ["layers.1.k.weight", "more than one"]),
    "truncated data": (cut(lambda size: size - 3), [SHARDS[0], "truncated", "expected", "got"]),
    "truncated header": (cut(lambda size: 40), [SHARDS[0], "truncated", "got 40 bytes"]),
    "truncated prefix": (cut(lambda size: 5), [SHARDS[0], "corrupt", "5 bytes"]),
    "empty shard": (cut(lambda size: 0), [SHARDS[0], "corrupt", "0 bytes"]),
    "header length": (_bytes_at(0, b"\xff" * 8), [SHARDS[0], "corrupt"]),
    "header junk": (_bytes_at(8, b"\xff\xfe"), [SHARDS[0], "corrupt"]),
    "hole": (_header(lambda header: header.pop("embed.weight")), [SHARDS[0], "corrupt"]),
    "entry": (_header(lambda header: header.update({"embed.weight": 3})), [SHARDS[0], "corrupt"]),
    "wrong shape": (_header(lambda header: header["embed.weight"].update(shape=[1, 2])), ["embed.weight", "corrupt"]),
    "longer": (_longer, [SHARDS[0], "corrupt", "expected"]),
    "gptq": (_config(quantization_config={"quant_method": "gptq", "bits": 4}), ["config.json", "gptq", "quantised"]),
    "nested awq": (_config(text_config={"quantization_config": {"quant_method": "awq"}}), ["awq", "quantised"]),
    "compressed": (_config(compression_config={"format": "x"}), ["quantised"]),
    "fp8": (_header(lambda header: header["embed.weight"].update(dtype="F8_E4M3")), ["embed.weight", "F8_E4M3"]),
    "int8": (_add("mlp.weight", torch.ones(4, 4, dtype=torch.int8), SHARDS[0]), ["mlp.weight", "packed int8"]),
    "qweight": (_add("mlp.qweight", torch.ones(4, 4, dtype=torch.int32), SHARDS[0]), ["mlp.qweight", "packed int32"]),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_a_source_is_refused_in_one_line(tmp_path: Path, case: str) -> None:
    spoil, words = REFUSED[case]
    path = save(tmp_path / "source", weights(torch.float32), by_layer)
    Checkpoint.open(path)
    spoil(path)
    with pytest.raises(UserError) as error:
        Checkpoint.open(path)
    one_line(error, path, *words)


def test_remote_code_and_numbers_that_are_none() -> None:
    refuse_remote_code({"model_type": "llama"})
    with pytest.raises(UserError, match="auto_map"):
        refuse_remote_code({"model_type": "own", "auto_map": {"AutoModel": "modeling.Model"}})
    check_finite("ids", torch.arange(3))
    for dtype in FLOATS:
        check_finite("fine", torch.ones(3, dtype=dtype))
        for bad in (float("nan"), float("inf"), float("-inf")):
            with pytest.raises(UserError, match=r"k\.weight: 1 of 2 elements"):
                check_finite("k.weight", torch.tensor([1, bad], dtype=dtype))


def test_resolve_takes_directories_and_explains_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pylib-llama").mkdir()
    (tmp_path / "file").touch()
    assert resolve(str(tmp_path / "pylib-llama")) == tmp_path / "pylib-llama"
    monkeypatch.chdir(tmp_path)
    assert resolve("pylib-llama") == Path("pylib-llama")
    for model, words in {
        "file": ["file"],
        str(tmp_path / "pylib-lama"): ["no such directory", "did you mean pylib-llama"],
        "./nowhere/at/all": ["no such directory"],
        "": ["empty name"],
        "nobody/no-such-model": ["nobody/no-such-model", "hub", "cannot be reached"],
        "not a name": ["not a name", "hub"],
    }.items():
        with pytest.raises(UserError) as error:
            resolve(model)
        one_line(error, model, *words)
