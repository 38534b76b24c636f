"""The config of a fold says its rotary parameters under the names of transformers 4 too, and both say the same."""

from typing import Any

import pytest
import tiny
from transformers import CONFIG_MAPPING

from headfold.families.old_names import ROTARY_NAMES, with_old_names
from headfold.rotary_tables import plane_frequencies, table_of_multiple

LLAMA_3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
NAMES = [name for name in tiny.TINY if "rope_parameters" in tiny.TINY[name]().to_dict() and name != "olmo3"]
"""OLMo 3's class takes the theta of its sliding layers from `rope_parameters` alone."""


def rotary(config: dict[str, Any]) -> dict[str, Any]:
    """Return the rotary parameters as the present class reads them."""
    found = CONFIG_MAPPING[config["model_type"]].from_dict(dict(config)).rope_parameters
    return {name: value for name, value in found.items() if name != "type"}


@pytest.mark.parametrize("name", NAMES)
def test_the_old_names_alone_say_the_same(name: str) -> None:
    plain = tiny.TINY[name]().to_dict()
    # Other values than the defaults of the class, which it would take where a name is missing.
    unusual = {"rope_theta": 777.0, "partial_rotary_factor": 0.5}
    found = plain["rope_parameters"]
    for rope in (found["full_attention"], found["sliding_attention"]) if "full_attention" in found else (found,):
        rope |= {field: value for field, value in unusual.items() if field in rope}
    plain |= {field: value for field, value in unusual.items() if field in plain}
    config = with_old_names(plain)
    old = {field: value for field, value in config.items() if field != "rope_parameters"}
    assert rotary(old) == rotary(config) == rotary(plain)


@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral"])
def test_the_old_names_of_another_table_say_the_same(name: str) -> None:
    plain = tiny.TINY[name](rope_parameters={**LLAMA_3, "rope_theta": 5e5}).to_dict()
    config = with_old_names(plain)
    assert config["rope_theta"] == 5e5 and config["rope_scaling"]["type"] == "llama3"
    assert rotary({**config, "rope_parameters": None}) == rotary(config) == rotary(plain)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_larger_table_replaces_what_either_name_said(legacy: bool) -> None:
    plain = tiny.TINY["llama"](rope_parameters={**LLAMA_3, "rope_theta": 5e5}).to_dict()
    source = with_old_names(plain)
    if legacy:
        del source["rope_parameters"]
    kept = {field: value for field, value in source.items() if field not in ROTARY_NAMES}
    wide = with_old_names({**kept, **table_of_multiple(source, "config.json", 2)})
    assert rotary(wide)["rope_type"] == "longrope" and rotary(wide)["rope_theta"] == 5e5
    assert rotary({**wide, "rope_parameters": None}) == rotary(wide)


def test_what_is_there_stays() -> None:
    config = {**tiny.TINY["llama"]().to_dict(), "rope_theta": 7.0}
    assert with_old_names(config)["rope_theta"] == 7.0
    assert with_old_names({"model_type": "t5"}) == {"model_type": "t5"}


def test_a_base_too_long_for_a_tensor_is_read() -> None:
    plain = tiny.TINY["llama"](rope_parameters={"rope_type": "default", "rope_theta": 10**25}).to_dict()
    assert plane_frequencies(plain, "config.json")[0] == 1.0
