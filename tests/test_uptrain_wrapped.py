"""Training a folded wrapper on: on text its language model alone, on images with texts also the tower that was folded."""

from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import one_line
from grades import assert_bitwise, assert_differs
from safetensors.torch import load_file
from test_captions import captioned  # noqa: F401 (a fixture)
from test_illustrated import COLUMNS, llava  # noqa: F401 (a fixture)
from wrapped_models import SEEN

import headfold
from headfold.checkpoint.config import read_config
from headfold.core.errors import UserError
from headfold.core.plan import Plan
from headfold.corpus.pairs import IGNORED
from headfold.families.wrapped import seen_tokens
from headfold.hf_models.building import open_config
from headfold.train.stream import Stream
from headfold.uptraining.config import kind_and_columns
from headfold.verbs.uptrain import uptrain

SHORT: dict[str, Any] = dict(steps=4, batch=4, context=32, log_every=1, learning_rate=1e-2, device="cpu")


@pytest.fixture(scope="module")
def folded(llava: Path, captioned: Path) -> Path:  # noqa: F811
    """A LLaVA whose tower and language model were folded on images with texts."""
    out = llava.parent / "folded"
    data = dict(calibration=str(captioned), columns=COLUMNS, items=8)
    headfold.fold(llava, out, kv_heads="1/2", merge="mean", group="contiguous", refit=False, encoder=True, **data)
    return out


@pytest.mark.parametrize("how", ["text", "text, distilled", "images", "images, distilled", "images, lora"])
def test_what_the_data_pass_is_trained(
    how: str,
    folded: Path,
    llava: Path,  # noqa: F811
    captioned: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    (tmp_path / "text.txt").write_text("a red square on grey and no circle\n\n" * 200)
    seen = {"data": str(captioned), "columns": COLUMNS}
    data = {"data": str(tmp_path / "text.txt")} if "text" in how else seen
    options: dict[str, Any] = {"distill": llava} if "distilled" in how else {}
    options |= {"train": "lora"} if "lora" in how else {}
    found = uptrain(folded, tmp_path / "out", **data, **options, **SHORT)
    assert found.kind == ("text" if "text" in how else "captions") and found.difference <= found.tolerance
    before, after = load_file(folded / "model.safetensors"), load_file(found.out / "model.safetensors")
    assert len(before) == len(after)
    names = {name.removeprefix("model."): name for name in after}
    for name, tensor in before.items():
        other = after[names[name.removeprefix("model.")]]
        if "self_attn" not in name or ("lora" in how and name.endswith("bias")):
            assert_bitwise(other, tensor)
        elif "language_model" in name or ("text" not in how and "layers.0" in name and "k_proj.bias" not in name):
            assert_differs(other, tensor)  # what a LLaVA reads of its tower does not pass the last layer
        elif "text" in how:
            assert_bitwise(other, tensor)
    headfold.load(found.out)


def test_data_of_the_calibration_have_its_columns() -> None:
    config = {"model_type": "llava", "vision_config": {}}
    plan = Plan(
        {},
        "contiguous",
        "",
        0,
        {"kind": "captions", "source": "a.parquet", "seed": "0", "tokens": "8", "columns": "image,caption"},
    )
    assert kind_and_columns(config, plan, None, ()) == ("captions", COLUMNS)
    assert kind_and_columns(config, plan, "b.txt", ()) == ("text", ())


def test_labels_are_what_is_written(folded: Path, captioned: Path) -> None:  # noqa: F811
    seen = seen_tokens(open_config(read_config(folded), "config.json").to_dict())
    assert seen == {SEEN}
    stream = Stream("captions", str(captioned), folded, None, 32, 0, COLUMNS, seen=seen)
    item = next(iter(stream))
    assert (item["input_ids"] == SEEN).sum() == 9
    written = item["attention_mask"].bool() & (item["input_ids"] != SEEN)
    assert torch.equal(item["labels"] != IGNORED, written)
    assert torch.equal(item["labels"][written], item["input_ids"][written])
    with pytest.raises(UserError, match="models of captions cannot be trained yet"):
        Stream("captions", str(captioned), folded, None, 32, 0, COLUMNS)


def test_a_fold_of_the_language_model_alone_is_trained_on_images(
    llava: Path,  # noqa: F811
    captioned: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    headfold.fold(llava, tmp_path / "fold", kv_heads=2, merge="mean", group="contiguous", refit=False)
    data = dict(data=str(captioned), columns=COLUMNS)
    found = uptrain(tmp_path / "fold", tmp_path / "out", distill=llava, **data, **SHORT)
    assert found.kind == "captions" and found.difference <= found.tolerance


def test_a_fold_with_a_tower_is_not_routed(folded: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("a red square on grey\n\n" * 200)
    with pytest.raises(UserError) as error:
        headfold.route(folded, tmp_path / "out", route="static", calibration=str(tmp_path / "text.txt"), tokens=64)
    one_line(error, folded, "whose tower is folded too", "--encoder")
    assert not list(tmp_path.glob("out*"))
