"""A checkpoint directory leads nowhere else: what is linked from outside, blocks its reader or comes beside the weights is refused."""

import contextlib
import errno
import json
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoints import one_line, save, weights
from safetensors.torch import load_file, save_file
from tiny import tiny_checkpoint

import headfold
from headfold.checkpoint import staging
from headfold.checkpoint.entries import check_entries
from headfold.checkpoint.reader import Checkpoint, resolve
from headfold.core.errors import UserError
from headfold.runtime.load import read_checked_config


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    path = save(tmp_path / "model", weights(torch.float32), None)
    (tmp_path / "secret").write_text("of another")
    return path


def _linked(name: str, target: str) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        (path / name).unlink(missing_ok=True)
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).symlink_to(target)

    return change


def _fifo(name: str) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        (path / name).unlink(missing_ok=True)
        os.mkfifo(path / name)

    return change


def _socket(path: Path) -> None:
    with contextlib.chdir(path), socket.socket(socket.AF_UNIX) as made:  # such names are short
        made.bind("generation_config.json")


def _modules(*paths: str) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        (path / "modules.json").write_text(json.dumps([{"path": "", "type": "T"}, *({"path": p} for p in paths)]))

    return change


def _module_file(path: Path) -> None:
    _modules("1_Pooling")(path)
    _linked("1_Pooling/config.json", "../../secret")(path)


def _module_link(path: Path) -> None:
    _modules("1_Pooling")(path)
    _linked("1_Pooling", "/etc")(path)


def _adapter(path: Path) -> None:
    (path / "adapter_config.json").write_text("{}")
    save_file({"lora_A": torch.ones(2)}, path / "adapter_model.safetensors")


REFUSED: dict[str, tuple[Callable[[Path], None], str]] = {
    "a side file from outside": (_linked("tokenizer.json", "../secret"), "leads out of its directory"),
    "weights from outside": (_linked("model.safetensors", "../secret"), "leads out of its directory"),
    "a config from outside": (_linked("config.json", "/etc/hostname"), "leads out of its directory"),
    "templates from outside": (_linked("additional_chat_templates", "/etc"), "leads out of its directory"),
    "a device": (_linked("vocab.txt", "/dev/zero"), "a device"),
    "a link to nothing": (_linked("merges.txt", "nowhere"), "a link to nothing"),
    "a circle of links": (_linked("merges.txt", "merges.txt"), "a link to nothing"),
    "a FIFO as config": (_fifo("config.json"), "config.json: expected a file, got a FIFO"),
    "a FIFO as weights": (_fifo("model.safetensors"), "a FIFO"),
    "a FIFO as plan": (_fifo("plan.json"), "a FIFO"),
    "a FIFO as list of modules": (_fifo("modules.json"), "a FIFO"),
    "a socket": (_socket, "a socket"),
    "a module's file from outside": (_module_file, "leads out of its directory"),
    "a linked module": (_module_link, "modules inside"),
    "a module outside": (_modules("../model/../.."), "modules inside"),
    "a module whose path has a null character": (_modules("a\0b"), "modules inside"),
    "a module by an absolute path": (_modules("/etc"), "modules inside"),
    "an adapter": (_adapter, "an adapter beside them"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_leads_elsewhere_is_refused_wherever_a_directory_is_opened(what: str, directory: Path) -> None:
    change, message = REFUSED[what]
    change(directory)
    for opened in (
        lambda: Checkpoint.open(directory),
        lambda: resolve(str(directory)),
        lambda: headfold.load(directory),
    ):
        with pytest.raises(UserError) as error:
            opened()
        one_line(error, directory, message if (directory / "config.json").is_file() else "config.json")


def test_links_inside_of_the_directory_are_files_of_it(directory: Path, tmp_path: Path) -> None:
    (directory / "LICENSE.txt").write_text("free")
    (directory / "LICENSE").symlink_to("LICENSE.txt")
    (directory / "logs").symlink_to(tmp_path)  # a directory of no name that is read
    _modules("1_Pooling", "2_Normalize")(directory)
    (tmp_path / "link").symlink_to(directory)
    for path in (directory, tmp_path / "link"):
        assert Checkpoint.open(path).num_parameters > 0 and read_checked_config(path)


@pytest.mark.parametrize("shared", [False, True])
def test_snapshots_of_the_hubs_cache_are_opened_and_folded_as_files(shared: bool, tmp_path: Path) -> None:
    """Every file of a snapshot is a link to a blob beside it, which may be a link into a store of the whole cache."""
    snapshot = tmp_path / "models--org--tiny" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    blobs = snapshot.parents[1] / "blobs"
    blobs.mkdir()
    for number, file in enumerate(tiny_checkpoint("llama", torch.float32).iterdir()):
        blob = blobs / f"{number:040x}"
        if shared:
            store = tmp_path / "blobs" / "ab" / f"{number:064x}"
            store.parent.mkdir(parents=True, exist_ok=True)
            blob.symlink_to(os.path.relpath(store, blobs))
        shutil.copyfile(file, store if shared else blob)
        (snapshot / file.name).symlink_to(os.path.relpath(blob, snapshot))
    (snapshot / "generation_config.json").exists()
    headfold.fold(snapshot, tmp_path / "out", kv_heads=4, merge="mean", group="contiguous", refit=False, verify=False)
    assert not any(file.is_symlink() for file in (tmp_path / "out").rglob("*"))
    (tmp_path / "models--org--tiny" / "secret").write_text("of another")
    (snapshot / "LICENSE").symlink_to("../../secret")
    with pytest.raises(UserError, match="leads out"):
        check_entries(snapshot)


def test_a_full_disk_names_the_output_and_an_unreadable_file_the_source(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (directory / "LICENSE").write_text("free")
    target = tmp_path / "target"
    target.mkdir()

    def failing(side: Path, code: int) -> Callable[..., object]:
        def opened(path: Path, *arguments: object, **keywords: object) -> object:
            if path.is_relative_to(side):
                raise OSError(code, os.strerror(code))
            return original(path, *arguments, **keywords)

        return opened

    original = Path.open
    monkeypatch.setattr(Path, "open", failing(target, errno.ENOSPC))
    with pytest.raises(UserError) as error:
        staging.copy_side_files(directory, target)
    one_line(error, target / "LICENSE", "the disk is full")
    monkeypatch.setattr(Path, "open", failing(directory, errno.EACCES))
    with pytest.raises(UserError) as error:
        staging.copy_side_files(directory, target)
    one_line(error, directory / "LICENSE", "cannot be read (Permission denied)")


@pytest.mark.parametrize(
    "fields",
    [
        {"attn_implementation": "someone/kernel"},
        {"_attn_implementation": "someone/kernel:flash"},
        {"attn_implementation": {"": "sdpa", "text_config": "someone/kernel"}},
        {"text_config": {"experts_implementation": "someone/kernel"}},
    ],
)
def test_a_config_that_names_code_of_the_hub_is_refused(fields: dict[str, object], directory: Path) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "attn_implementation": "sdpa"}))
    Checkpoint.open(directory)
    (directory / "config.json").write_text(json.dumps({**config, **fields}))
    for opened in (Checkpoint.open, headfold.load):
        with pytest.raises(UserError) as error:
            opened(directory)
        one_line(error, directory / "config.json", "code of the hub")


@pytest.mark.parametrize(
    "how", ["a layout that has no such name", "a layout for other counts", "weights that are not finite"]
)
def test_what_never_succeeds_leaves_nothing_behind(how: str, tmp_path: Path) -> None:
    source, words = tmp_path / "model", {"kv_heads": 4, "merge": "mean", "group": "contiguous", "refit": False}
    shutil.copytree(tiny_checkpoint("llama", torch.float32), source)
    if how == "weights that are not finite":
        tensors = load_file(source / "model.safetensors")
        tensors["lm_head.weight"][0, 0] = torch.nan  # copied, and seen at the end alone
        save_file(tensors, source / "model.safetensors", {"format": "pt"})
    else:
        words["layout"] = "nope" if "name" in how else "padded"
        words |= {"merge": "absorb", "group": "swap"}  # which would be calibrated first
    with pytest.raises(UserError, match="NaN or infinite" if "finite" in how else "layout"):
        headfold.fold(source, tmp_path / "out", **words)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
