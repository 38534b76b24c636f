"""Laws of staging: at an output place stands the old directory or the new one, whole."""

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from checkpoints import by_layer, contents, one_line, save, weights

from headfold.checkpoint import staging
from headfold.checkpoint.disk import replacing, temporary_beside
from headfold.core.errors import AlreadyFinished, SourceError, UserError
from headfold.outputs import removed_on_error
from headfold.stats_file import write_stats


def test_staging_on_a_read_only_place_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, *arguments: object, **keywords: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(UserError) as error:
        staging.open_staging(tmp_path / "out", "key", False)
    one_line(error, tmp_path, "read-only")


def finish(out: Path, key: str = "key", force: bool = False, text: str = "new") -> None:
    place = staging.open_staging(out, key, force)
    (place / "file").write_text(text)
    staging.commit(place, out, force)


def test_commit_puts_the_whole_directory_in_place(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    finish(out)
    assert [entry.name for entry in out.iterdir()] == ["file"] and [entry.name for entry in out.parent.iterdir()] == [
        "out"
    ]
    with pytest.raises(UserError) as error:
        finish(out)
    one_line(error, out, "--force")
    finish(out, force=True, text="newer")
    assert (out / "file").read_text() == "newer" and [entry.name for entry in out.parent.iterdir()] == ["out"]


def test_an_empty_directory_is_free_and_a_file_is_not(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    finish(tmp_path / "out")
    (tmp_path / "file").touch()
    for force in (False, True):
        with pytest.raises(UserError, match="got a file"):
            staging.open_staging(tmp_path / "file", "key", force)


def test_staging_keeps_its_own_job_empties_another_and_refuses_a_stranger(tmp_path: Path) -> None:
    place = staging.open_staging(tmp_path / "out", "a", False)
    (place / "half").touch()
    (place / "folder").mkdir()
    assert (staging.open_staging(tmp_path / "out", "a", False) / "half").exists()
    assert [entry.name for entry in staging.open_staging(tmp_path / "out", "b", False).iterdir()] == [staging.JOB]
    (place / staging.JOB).unlink()
    (place / "precious").touch()
    with pytest.raises(UserError, match="headfold did not make"):
        staging.open_staging(tmp_path / "out", "b", True)
    assert (place / "precious").exists()


def test_a_job_that_does_not_resume_begins_anew_but_finishes_a_whole_output(tmp_path: Path) -> None:
    out = tmp_path / "out"
    place = staging.open_staging(out, "a", False, resumes=False)
    (place / "half").touch()
    assert [entry.name for entry in staging.open_staging(out, "a", False, resumes=False).iterdir()] == [staging.JOB]
    staging._mark(place, "a" + staging._FINISHED)
    place.rename(out)
    with pytest.raises(AlreadyFinished):
        staging.open_staging(out, "a", False, resumes=False)
    assert list(out.iterdir()) == []


def test_nothing_is_refused_early_that_the_lock_decides(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").touch()
    assert not staging.holds_other_job(tmp_path / "out", "key", False)
    staging.open_staging(tmp_path / "free", "a", False)
    assert staging.holds_other_job(tmp_path / "free", "b", False)
    assert not staging.holds_other_job(tmp_path / "free", "a", False)


@pytest.mark.parametrize("step", range(3))
def test_a_replacing_commit_killed_anywhere_leaves_the_old_or_the_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """Step 0 dies at the first renaming, 1 between the two, 2 while the old directory is removed."""
    out = tmp_path / "out"
    finish(out, text="old")
    renamings = []
    rename = Path.rename

    def dying(path: Path, place: Path) -> Path:
        renamings.append(path)
        if len(renamings) > step:
            raise KeyboardInterrupt
        return rename(path, place)

    def die(path: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "rename", dying)
    if step == 2:
        monkeypatch.setattr(shutil, "rmtree", die)
    with pytest.raises(KeyboardInterrupt):
        finish(out, force=True)
    monkeypatch.undo()
    texts = [path.read_text() for path in tmp_path.glob("*/file")] + [
        path.read_text() for path in tmp_path.glob(".*/file")
    ]
    assert "old" in texts and "new" in texts
    if step < 2:
        with pytest.raises(UserError, match="--force"):
            staging.open_staging(out, "key", False)
        assert (out / "file").read_text() == "old"
    with pytest.raises(
        AlreadyFinished
    ):  # the new one was whole: what is left is to put it in its place, and to remove the old one
        finish(out, force=True, text="made twice")
    assert (out / "file").read_text() == "new" and [entry.name for entry in tmp_path.iterdir()] == ["out"]


def test_a_failing_commit_puts_the_old_directory_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    finish(out, text="old")
    rename = Path.rename

    def refuse(path: Path, place: Path) -> Path:
        if path.name.endswith(".partial"):
            raise OSError(errno.EACCES, os.strerror(errno.EACCES))
        return rename(path, place)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(UserError, match="permission"):
        finish(out, force=True)
    assert (out / "file").read_text() == "old"


def test_overlap_of_source_and_output_is_refused(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "source")
    for out in ("source", "source/inside", "link", "link/inside", "."):
        with pytest.raises(UserError, match="overlaps"):
            staging.refuse_overlap(tmp_path / "source", tmp_path / out)
    staging.refuse_overlap(tmp_path / "source", tmp_path / "source-folded")


def test_side_files_come_along_and_weights_do_not(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    source = save(tmp_path / "source", weights(torch.float32), by_layer)
    wanted = [
        "LICENSE",
        "chat_template.jinja",
        "generation_config.json",
        "merges.txt",
        "tokenizer.json",
        "tokenizer.model",
    ]
    unwanted = [
        "README.md",
        "plan.json",
        ".gitattributes",
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
        "m.gguf",
        "tf_model.h5",
    ]
    for name in wanted + unwanted:
        (source / name).write_text(name)
    (source / "onnx").mkdir()
    assert staging.copy_side_files(source, target) == wanted
    assert contents(target) == {name: name.encode() for name in wanted}


def test_modules_of_sentence_transformers_come_along_and_nothing_from_outside(tmp_path: Path) -> None:
    source, target, outside = tmp_path / "source", tmp_path / "target", tmp_path / "outside"
    for folder in (source / "1_Pooling", source / "2_Dense", source / "other", target, outside):
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(folder.name)
    (source / "2_Dense/model.safetensors").write_text("weights")
    (source / "linked").symlink_to(outside)
    paths = [
        "",
        "1_Pooling",
        "2_Dense",
        "3_Normalize",
        "../outside",
        str(outside),
        "linked",
        ".git",
        "1_Pooling/../../outside",
    ]
    (source / "modules.json").write_text(json.dumps([{"path": path, "type": "any"} for path in paths]))
    for written in (target, tmp_path / "again"):
        written.mkdir(exist_ok=True)
        copied = staging.copy_side_files(source, written)
        assert copied == ["modules.json", "1_Pooling/config.json", "2_Dense/config.json", "2_Dense/model.safetensors"]
    assert (target / "2_Dense/model.safetensors").read_text() == "weights" and not (target / "other").exists()


@pytest.mark.parametrize("text", ["[", "{}", "[1]", '[{"name": "0"}]', "null", "[" * 100_000])
def test_a_list_of_modules_that_cannot_be_read_lists_none(text: str, tmp_path: Path) -> None:
    (tmp_path / "target").mkdir()
    (tmp_path / "modules.json").write_text(text)
    assert staging.copy_side_files(tmp_path, tmp_path / "target") == ["modules.json"]


def test_write_json_replaces_whole_files_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    staging.write_json(tmp_path / "a.json", {"é": [1, 2.5]})
    with pytest.raises(TypeError):
        staging.write_json(tmp_path / "a.json", {"bad": object()})
    assert json.loads((tmp_path / "a.json").read_text()) == {"é": [1, 2.5]}
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize("kind", [UserError, OSError, KeyboardInterrupt, AssertionError])
@pytest.mark.parametrize("holds", ["nothing", "an empty directory", "a file"])
def test_what_holds_nothing_does_not_stay_behind(tmp_path: Path, kind: type[BaseException], holds: str) -> None:
    """Whatever the reason; files that another run resumes from stay."""
    place = staging.open_staging(tmp_path / "out", "key", False)
    with pytest.raises(kind), removed_on_error(place):
        if holds != "nothing":
            (place / "work").mkdir()
        if holds == "a file":
            (place / "work" / "stats").write_text("measured")
        raise kind
    assert place.exists() == (holds == "a file")


def test_who_has_an_error_is_told_what_is_kept(tmp_path: Path) -> None:
    def broken(error: UserError, *, resumes: bool = True) -> str:
        place = staging.open_staging(tmp_path / "out", "key", False)
        with pytest.raises(type(error)) as raised, removed_on_error(place, resumes=resumes):
            (place / "stats").write_text("measured")
            raise error
        return f"{raised.value}, {sorted(path.name for path in tmp_path.iterdir())}"

    kept = f"what was done until then is kept in {tmp_path / 'out.partial'}"
    assert broken(UserError("disk full")) == f"disk full; {kept}, ['out.partial']"
    assert broken(UserError(f"{tmp_path / 'out.partial'}: wrong")).endswith("wrong, ['out.partial']")
    assert broken(SourceError("NaN")) == "NaN, []"
    assert broken(UserError("disk full"), resumes=False) == "disk full, []"


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("at", ["renaming", "removal of the mark"])
def test_a_whole_output_whose_commit_was_killed_is_finished_by_its_own_job_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str, force: bool
) -> None:
    out, rename, unlink = tmp_path / "out", Path.rename, Path.unlink
    if force:
        finish(out, key="other", text="old")

    def dying_rename(path: Path, place: Path) -> Path:
        if path.name == "out.partial":
            raise KeyboardInterrupt
        return rename(path, place)

    def dying_unlink(path: Path, missing_ok: bool = False) -> None:
        if path.name == staging.JOB:
            raise KeyboardInterrupt
        unlink(path, missing_ok)

    with monkeypatch.context() as patch:
        if at == "renaming":
            patch.setattr(Path, "rename", dying_rename)
        else:
            patch.setattr(Path, "unlink", dying_unlink)
        with pytest.raises(KeyboardInterrupt):
            finish(out, force=force)
    if at != "renaming":
        with pytest.raises(UserError, match="--force"):
            staging.open_staging(out, "a third job", False)
    with pytest.raises(AlreadyFinished, match="an earlier run of the same job finished this"):
        staging.open_staging(out, "key", force)
    assert contents(out) == {"file": b"new"} and [entry.name for entry in tmp_path.iterdir()] == ["out"]


def test_an_unfinished_directory_under_the_outputs_name_is_not_taken_for_finished(tmp_path: Path) -> None:
    staging.open_staging(tmp_path / "out", "key", False).rename(tmp_path / "out")
    with pytest.raises(UserError, match="--force"):
        staging.open_staging(tmp_path / "out", "key", False)


@pytest.mark.parametrize("leads_to", ["contents", "an empty directory", "nothing", "a directory of the same job"])
def test_links_at_the_staging_place_and_at_the_output_are_not_followed(tmp_path: Path, leads_to: str) -> None:
    target = tmp_path / "target"
    if leads_to != "nothing":
        target.mkdir()
    if leads_to == "contents":
        (target / "precious").touch()
    if leads_to == "a directory of the same job":
        (target / staging.JOB).write_text("another")
        (target / "precious").touch()
    before = sorted(path.name for path in tmp_path.rglob("*"))
    for link in ("out.partial", "out"):
        (tmp_path / link).symlink_to(target)
        for force in (False, True):
            with pytest.raises(UserError) as error:
                staging.open_staging(tmp_path / "out", "key", force)
            one_line(error, tmp_path / link, "a symbolic link")
        (tmp_path / link).unlink()
        assert sorted(path.name for path in tmp_path.rglob("*")) == before


def test_files_are_written_under_no_name_of_a_user_first(tmp_path: Path) -> None:
    for name in ("x.partial", "y.json.partial"):
        (tmp_path / name).write_text("mine")
    write_stats(tmp_path / "x", {}, {})
    staging.write_json(tmp_path / "y.json", {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x", "x.partial", "y.json", "y.json.partial"]
    assert {(tmp_path / name).read_text() for name in ("x.partial", "y.json.partial")} == {"mine"}


def test_a_link_under_a_temporary_name_is_replaced_and_not_followed(tmp_path: Path) -> None:
    """Others may put one into a directory that they share."""
    precious = tmp_path / "precious"
    precious.write_text("years of work")
    for path, write in (
        (tmp_path / "x", lambda path: write_stats(path, {}, {})),
        (tmp_path / "y.json", lambda path: staging.write_json(path, {})),
    ):
        temporary_beside(path).symlink_to(precious)
        write(path)
        assert path.is_file() and not os.path.lexists(temporary_beside(path))
    assert precious.read_text() == "years of work"


def test_a_way_back_out_of_no_directory_leaves_none(tmp_path: Path) -> None:
    staging.write_json(tmp_path / "absent" / ".." / "x.json", {})
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


def test_an_error_leaves_no_temporary_file_and_the_old_one(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("old")
    with pytest.raises(UserError) as error, replacing(tmp_path / "x") as temporary:
        temporary.write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")
    one_line(error, tmp_path / "x", "the disk is full")
    assert [file.name for file in tmp_path.iterdir()] == ["x"] and (tmp_path / "x").read_text() == "old"
