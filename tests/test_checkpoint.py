"""Laws of the checkpoint floor: what is not folded is copied bit by bit, and no failure leaves anything half-written."""

import contextlib
import errno
import gc
import json
import os
import shutil
import tempfile
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoints import FLOATS, LAYOUTS, NUM_SITES, SHARDS, Fold, by_layer, contents, cut, one_line, same, save, weights
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from headfold.checkpoint import transfer
from headfold.checkpoint.headers import DTYPES
from headfold.checkpoint.reader import Checkpoint
from headfold.checkpoint.writer import output_bytes, rewrite
from headfold.core.errors import UserError


@pytest.fixture(params=LAYOUTS)
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Checkpoint:
    return Checkpoint.open(save(tmp_path / "source", weights(torch.bfloat16), LAYOUTS[request.param]))


@pytest.fixture
def target(tmp_path: Path) -> Path:
    path = tmp_path / "target"
    path.mkdir()
    return path


@pytest.mark.parametrize(
    "dtype", [dtype for dtype in DTYPES.values() if dtype not in (torch.uint64, torch.uint32, torch.uint16)]
)
def test_read_is_bitwise_what_safetensors_reads(tmp_path: Path, dtype: torch.dtype) -> None:
    drawn = (10 * torch.randn(7, 3)).to(dtype)
    tensors = {"matrix": drawn, "scalar": drawn[0, 0].clone(), "empty": drawn[:0].clone()}
    checkpoint = Checkpoint.open(save(tmp_path / "source", tensors, None))
    assert checkpoint.num_bytes == sum(t.nbytes for t in tensors.values())
    for name, tensor in tensors.items():
        same(checkpoint.read(name), tensor)


def test_read_takes_memory_for_one_tensor_only(tmp_path: Path) -> None:
    large = {f"large.{i}": torch.zeros(2**22) for i in range(4)}
    checkpoint = Checkpoint.open(save(tmp_path / "source", large | {"small": torch.ones(4)}, None))
    del large
    before = _forget_peak()
    tensor = checkpoint.read("small")
    assert _resident("VmHWM") - before < 2**23, "a shard of 64 MiB was in memory for a tensor of 16 bytes"
    assert tensor.sum() == 4


def _forget_peak() -> int:
    """Resident bytes now, from which the kernel's record of the peak starts again."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pytest.skip("the peak of resident memory cannot be reset here")
    return _resident("VmRSS")


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field))


def test_fingerprint_follows_the_contents_and_not_the_name(source: Checkpoint, tmp_path: Path) -> None:
    copy = shutil.copytree(source.path, tmp_path / "elsewhere")
    assert Checkpoint.open(copy).fingerprint() == source.fingerprint()
    info = source.tensors["layers.2.v.weight"]
    for offset in (info.start, info.end - 1):
        _flip(copy / info.shard, offset)
        assert Checkpoint.open(copy).fingerprint() != source.fingerprint()
        _flip(copy / info.shard, offset)
    (copy / "config.json").write_text(json.dumps({"model_type": "mistral", "hidden_size": 8}))
    assert Checkpoint.open(copy).fingerprint() != source.fingerprint()


def _flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def test_single_file_wins_over_an_index_as_in_transformers(tmp_path: Path) -> None:
    path = save(tmp_path / "source", weights(torch.float16), by_layer)
    save_file({"only": torch.ones(2)}, path / "model.safetensors")
    assert Checkpoint.open(path).shards == ("model.safetensors",)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_replaced_tensors_are_the_produced_ones_and_the_rest_is_bitwise_the_source(
    tmp_path: Path, target: Path, layout: str, dtype: torch.dtype
) -> None:
    fold = Fold(Checkpoint.open(save(tmp_path / "source", weights(dtype), LAYOUTS[layout])))
    fold.write(target)
    written = Checkpoint.open(_with_config(target, fold.source))
    assert list(written.tensors) == list(fold.source.tensors) and written.metadata == fold.source.metadata
    for name, info in fold.source.tensors.items():
        old = fold.source.read(name)
        expected = old.view(4, 2, 8).mean(1) if name in fold.shapes else old
        assert written.tensors[name].shard == info.shard
        same(written.read(name), expected)
        with safe_open(target / info.shard, "pt") as file:
            same(file.get_tensor(name), expected)
            assert file.metadata() == fold.source.metadata[info.shard]
    assert sorted(fold.calls) == [f"layers.{site}" for site in range(NUM_SITES)]


def _with_config(target: Path, source: Checkpoint) -> Path:
    shutil.copy(source.path / "config.json", target)
    return target


def test_index_keeps_everything_but_the_sizes(tmp_path: Path, target: Path) -> None:
    fold = Fold(Checkpoint.open(save(tmp_path / "source", weights(torch.float32), by_layer)))
    fold.write(target)
    index = json.loads((target / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == fold.source.index["weight_map"]
    removed = NUM_SITES * 2 * 4 * 8
    assert index["metadata"] == {
        "total_size": fold.source.num_bytes - 4 * removed,
        "total_parameters": 1000 - removed,
        "note": "kept",
    }
    written = Checkpoint.open(_with_config(target, fold.source))
    assert index["metadata"]["total_size"] == written.num_bytes


_SHAPES = st.lists(st.integers(0, 5), max_size=3).map(tuple)
_TENSORS = st.dictionaries(
    st.text("abé.☃", min_size=1, max_size=5),
    st.tuples(
        _SHAPES, st.sampled_from([*FLOATS, torch.int64, torch.bool]), st.sampled_from(SHARDS), st.none() | _SHAPES
    ),
    min_size=1,
    max_size=12,
)


@settings(max_examples=60, deadline=None)
@given(_TENSORS)
def test_any_tensors_in_any_shards_with_any_replaced(drawn: dict) -> None:
    tensors = {name: torch.randint(0, 2, shape).to(dtype) for name, (shape, dtype, _, _) in drawn.items()}
    new = {n: torch.randint(0, 2, shape).to(drawn[n][1]) for n, (*_, shape) in drawn.items() if shape is not None}
    with tempfile.TemporaryDirectory() as root:
        source = Checkpoint.open(save(Path(root) / "source", tensors, lambda name: drawn[name][2]))
        for replaced in ({}, new):
            target = Path(root) / f"target{len(replaced)}{replaced is new}"
            target.mkdir()
            shapes = {name: tuple(t.shape) for name, t in replaced.items()}
            rewrite(source, target, shapes, dict.fromkeys(replaced, "site"), lambda site, made=replaced: made)
            for shard in source.shards:
                loaded = load_file(target / shard)
                assert loaded.keys() == source.in_shard(shard).keys()
                for name, tensor in loaded.items():
                    same(tensor, replaced.get(name, tensors[name]))
                if not replaced:
                    assert (target / shard).read_bytes() == (source.path / shard).read_bytes()


def test_progress_adds_up_to_the_bytes_of_the_output(source: Checkpoint, target: Path) -> None:
    fold, heard = Fold(source), []
    fold.write(target, heard.append)
    assert sum(heard) == output_bytes(source, fold.shapes) == sum((target / s).stat().st_size for s in source.shards)
    heard.clear()
    fold.write(target, heard.append)
    assert sum(heard) == output_bytes(source, fold.shapes)


def test_only_one_site_is_in_memory(source: Checkpoint, target: Path) -> None:
    fold, earlier = Fold(source), []

    def produce(site: str) -> dict[str, Tensor]:
        assert all(reference() is None for reference in earlier), "tensors of an earlier site are still alive"
        made = fold.produce(site)
        earlier.extend(weakref.ref(tensor) for tensor in made.values())
        return made

    gc.disable()
    try:
        rewrite(source, target, fold.shapes, fold.owner, produce)
    finally:
        gc.enable()
    assert len(earlier) == 2 * NUM_SITES


@pytest.mark.parametrize("failing", [[], ["copy_file_range"], ["copy_file_range", "sendfile"]])
@pytest.mark.parametrize("code", [errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP])
def test_every_way_of_copying_gives_the_same_bytes(
    source: Checkpoint, target: Path, monkeypatch: pytest.MonkeyPatch, failing: list[str], code: int
) -> None:
    tried = set()

    def refuse(name: str) -> Callable[..., int]:
        def call(*arguments: int) -> int:
            tried.add(name)
            raise OSError(code, os.strerror(code))

        return call

    for name in failing:
        monkeypatch.setattr(os, name, refuse(name), raising=False)
    # A few bytes per call: the pieces have to be put together again.
    monkeypatch.setattr(transfer, "CHUNK", 7)
    Fold(source).write(target)
    assert tried == set(failing)
    monkeypatch.undo()
    plain = target.with_name("plain")
    plain.mkdir()
    Fold(source).write(plain)
    assert contents(target) == contents(plain)


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(sorted(LAYOUTS)),
    st.lists(st.tuples(st.sampled_from(["produce", "progress"]), st.integers(0, 30)), max_size=3),
)
def test_killed_anywhere_and_run_again_gives_the_same_bytes(layout: str, kills: list[tuple[str, int]]) -> None:
    with tempfile.TemporaryDirectory() as root:
        source = Checkpoint.open(save(Path(root) / "source", weights(torch.float32), LAYOUTS[layout]))
        whole, broken = Path(root) / "whole", Path(root) / "broken"
        whole.mkdir(), broken.mkdir()
        Fold(source).write(whole)
        for where, step in kills:
            _write_and_die(
                Fold(source, step if where == "produce" else None), broken, step if where == "progress" else None
            )
            finished = {name for name in contents(broken) if name in source.shards}
            assert all((broken / name).read_bytes() == (whole / name).read_bytes() for name in finished)
            for partial in broken.glob("*.partial"):
                # Power may go before the data reaches the disk.
                partial.write_bytes(b"\xff" * (partial.stat().st_size // 2))
        Fold(source).write(broken)
        assert contents(broken) == contents(whole)


def _write_and_die(fold: Fold, target: Path, step: int | None) -> None:
    heard = []

    def progress(count: int) -> None:
        heard.append(count)
        if step is not None and len(heard) > step:
            raise KeyboardInterrupt

    with contextlib.suppress(KeyboardInterrupt):
        fold.write(target, progress)


def test_a_rerun_makes_only_what_is_missing(tmp_path: Path, target: Path) -> None:
    source = Checkpoint.open(save(tmp_path / "source", weights(torch.float32), by_layer))
    Fold(source).write(target)
    stamp = (target / SHARDS[0]).stat().st_mtime_ns
    whole = contents(target)
    (target / SHARDS[1]).unlink()
    (target / SHARDS[2]).write_bytes(whole[SHARDS[2]][:-1])
    fold = Fold(source)
    fold.write(target)
    assert contents(target) == whole and fold.calls == ["layers.1", "layers.2"]
    assert (target / SHARDS[0]).stat().st_mtime_ns == stamp


def test_too_little_space_is_refused_before_anything_is_written(
    source: Checkpoint, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fold = Fold(source)
    needed = output_bytes(source, fold.shapes)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, needed - 1))
    with pytest.raises(UserError) as error:
        fold.write(target)
    one_line(error, target, needed, needed - 1)
    assert not contents(target) and not fold.calls


@pytest.mark.parametrize(
    "code, words", [(errno.ENOSPC, "full"), (errno.EROFS, "read-only"), (errno.EACCES, "permission")]
)
@pytest.mark.parametrize("call", ["pwrite", "ftruncate", "copy_file_range", "fsync"])
def test_a_disk_that_refuses_midway_is_one_line_and_a_rerun_finishes(
    source: Checkpoint, target: Path, monkeypatch: pytest.MonkeyPatch, call: str, code: int, words: str
) -> None:
    def refuse(*arguments: object) -> int:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, call, refuse)
    with pytest.raises(UserError) as error:
        Fold(source).write(target)
    one_line(error, target, words, "bytes")
    monkeypatch.undo()
    midway = contents(target)
    assert call != "fsync" or not midway.keys() & set(source.shards)
    Fold(source).write(target)
    after = contents(target)
    assert all(after[name] == data for name, data in midway.items() if name in source.shards)
    assert set(source.shards) <= after.keys() and not [name for name in after if name.endswith(".partial")]


def test_a_shard_cut_after_opening_is_refused(tmp_path: Path, target: Path) -> None:
    source = Checkpoint.open(save(tmp_path / "source", weights(torch.float32), by_layer))
    last = max(source.in_shard(SHARDS[0]).items(), key=lambda item: item[1].end)[0]
    cut(lambda size: size - 3)(source.path)
    for attempt in (lambda: source.read(last), lambda: Fold(source).write(target)):
        with pytest.raises(UserError) as error:
            attempt()
        one_line(error, SHARDS[0], "expected")
