"""A short slice of the fuzz of parsers, and what longer ones found."""

import contextlib
import json
import os
import shutil
import struct
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hostile import parsers
from hostile.models import shard, write_parts_of_words
from hostile.parsers import PARSERS, Trial, at_random, fuzz
from tiny import tiny_checkpoint

from headfold.checkpoint.reader import INDEX, Checkpoint
from headfold.core.errors import UserError
from headfold.corpus.audio import read_audio
from headfold.corpus.pairs import read_pairs
from headfold.llama_cpp.tokens import tokenizer_why_not

# pyarrow may end its process, which the fuzz itself survives in children.
IN_PROCESS = tuple(parser for parser in PARSERS if parser.name != "table")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("parsers") / "whole"
    parsers.write_whole(root)
    return root


def test_a_slice_of_the_fuzz_finds_nothing(whole: Path, tmp_path: Path) -> None:
    count, found = fuzz(whole, tmp_path, 2.0, 0, at_random, IN_PROCESS)
    assert found == [] and count > 10 * len(IN_PROCESS)


def test_what_is_no_user_error_and_a_message_of_two_lines_are_found_and_the_parser_reads_the_whole(
    whole: Path, tmp_path: Path
) -> None:
    def read(folder: Path) -> object:
        text = (folder / "plan.json").read_text(errors="replace")
        raise UserError("a\nb") if text.startswith("{") else KeyError("x")

    plan = next(parser for parser in PARSERS if parser.name == "plan")
    trial = Trial(replace(plan, read=read), whole, tmp_path / "folder", 0)
    trial.run("whole", trial.whole)
    trial.run("other", b"other")
    trial.run("other", b"others")
    assert [(one.what, one.wrong) for one in trial.found.values()] == [
        ("whole", "a line break in a message"), ("other", "outside KeyError: 'x'"),
    ]  # fmt: skip
    for parser in PARSERS:
        trial = Trial(parser, whole, tmp_path / parser.name, 0)
        trial.run("whole", trial.whole)
        assert not trial.found, parser.name


def test_an_index_that_names_a_file_as_no_file_can_be_called_is_refused_in_a_short_line(tmp_path: Path) -> None:
    shard(tiny_checkpoint("llama", torch.float32), tmp_path / "sharded")
    index = json.loads((tmp_path / "sharded" / INDEX).read_text())
    index["weight_map"]["lm_head.weight"] = "x" * 3000
    (tmp_path / "sharded" / INDEX).write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"names shards that are missing: x{100};") as refused:
        Checkpoint.open(tmp_path / "sharded")
    assert len(str(refused.value)) < 600


@pytest.mark.parametrize("change", ["twice", "unlisted"])
def test_a_template_of_another_form_is_no_tokenizer_for_llama_cpp(tmp_path: Path, change: str) -> None:
    write_parts_of_words(tmp_path)
    assert tokenizer_why_not(tmp_path) is None
    file = tmp_path / "tokenizer.json"
    found = json.loads(file.read_text())
    template = found["post_processor"]
    if change == "twice":
        template["single"][0] = {"Sequence": {"id": "B", "type_id": 0}}
    else:
        template["special_tokens"] = {"[SEP]": template["special_tokens"]["[SEP]"]}
    file.write_text(json.dumps(found))
    assert "and llama.cpp would find other tokens" in (tokenizer_why_not(tmp_path) or "")


def test_a_recording_with_a_part_longer_than_itself_is_refused(tmp_path: Path) -> None:
    form = b"fmt " + struct.pack("<IHHIIHH", 16, 1, 1, 8000, 16000, 2, 16)
    (tmp_path / "a.wav").write_bytes(
        b"RIFF" + struct.pack("<I", 60) + b"WAVE" + form + b"LIST" + struct.pack("<I", 2**31) + bytes(10)
    )
    with pytest.raises(UserError, match=r"a\.wav: expected (sound|wav of 16 bits) \("):
        read_audio(str(tmp_path))


def test_a_table_with_broken_sizes_of_its_columns_does_not_end_the_process(whole: Path, tmp_path: Path) -> None:
    """In a child, as pyarrow's own reader of these sizes ends it: a column that may be null is said to be none."""
    file, data = tmp_path / "pairs.parquet", (whole / "pairs.parquet").read_bytes()
    optional, required = (b"\x25" + repetition + b"\x18\x06source" for repetition in (b"\x02", b"\x00"))
    assert optional in data
    file.write_bytes(data.replace(optional, required))
    pid = os.fork()
    if pid == 0:
        with contextlib.suppress(UserError):
            read_pairs(str(file), seed=0)
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    shutil.copyfile(whole / "pairs.parquet", file)
    assert len(read_pairs(str(file), seed=0)) == 24
