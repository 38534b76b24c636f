"""Towers inside wrappers: the encoder of images or sound before a language model, where its attention is one that folds.

A tower's config is nested in that of its wrapper. Its class reads no count of K/V heads, so a folded tower runs in headfold's runtime,
also where the language model behind it is a stock one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from .core.errors import UserError, listed
from .families.clip_vision import FAMILY as CLIP_VISION
from .families.spec import Attention, Family, Rope, Site, is_base_model, read_field, sites
from .families.wrapped import AUDIO, VISION, Place


@dataclass(frozen=True, slots=True)
class Tower:
    """Where a wrapper has its tower."""

    field: str = "vision_config"
    """Field of the wrapper's config with the tower's own."""
    body: str = "vision_tower"
    """Name of the tower among the wrapper's modules."""

    @property
    def stack(self) -> str:
        """The first part of the names of its sites."""
        return AUDIO if self.field == "audio_config" else VISION


_TOWERS: Mapping[str, Tower] = {
    "idefics2": Tower(body="vision_model"),
    "idefics3": Tower(body="vision_model"),
    "qwen2_5_vl": Tower(body="visual"),
    "qwen2_audio": Tower("audio_config", "audio_tower"),
    "qwen2_vl": Tower(body="visual"),
    "smolvlm": Tower(body="vision_model"),
    "voxtral": Tower("audio_config", "audio_tower"),
}
"""By the `model_type` of the wrapper, where it is not the usual one."""
_INNER = ("", "vision_model.")
"""What may stand between the tower and its layers in the names on disk: older versions of transformers wrote a component more."""

_OF_WHISPER: dict[str, Any] = dict(
    name="", at="audio_tower.layers.{layer}.self_attn", q="q_proj", k="k_proj", v="v_proj", o="out_proj", kv_heads="",
    input_norm="self_attn_layer_norm",
)  # fmt: skip
_OF_QWEN: dict[str, Any] = dict(
    name="", at="visual.blocks.{layer}.attn", qkv="qkv", o="proj", kv_heads="", layers="depth", heads="num_heads", input_norm="norm1",
)  # fmt: skip
_INTERNVL = Attention(
    name="", at="vision_tower.encoder.layer.{layer}.attention", q="q_proj", k="k_proj", v="v_proj", o="projection_layer", kv_heads="",
    input_norm="layernorm_before",
)  # fmt: skip
_PIXTRAL = Attention(
    name="", at="vision_tower.transformer.layers.{layer}.attention", q="q_proj", k="k_proj", v="v_proj", o="o_proj", kv_heads="",
    input_norm="attention_norm",
)  # fmt: skip
_KINDS = (
    replace(
        CLIP_VISION, model_types=(*CLIP_VISION.model_types, "idefics2_vision", "idefics3_vision", "smolvlm_vision")
    ),
    Family(
        ("internvl_vision",),
        (_INTERNVL,),
        refuses={"use_qk_norm": "its keys pass a norm over all heads together, which fewer heads would change"},
    ),
    Family(("pixtral",), (_PIXTRAL,), Rope()),
    Family(("qwen2_vl_vision",), (Attention(**_OF_QWEN, hidden_size="embed_dim"),), Rope()),
    Family(("qwen2_5_vl_vision",), (Attention(**_OF_QWEN),), Rope()),
    Family(
        ("qwen2_audio_encoder",),
        (Attention(**_OF_WHISPER, layers="encoder_layers", heads="encoder_attention_heads", hidden_size="d_model"),),
    ),
    Family(("voxtral_encoder",), (Attention(**_OF_WHISPER),)),
)
"""Literals of towers. Positions of two coordinates turn one frequency plane each, so one complex number is free per plane."""


def tower_of(config: Mapping[str, Any]) -> tuple[Tower, Mapping[str, Any]]:
    """Return where a wrapper has its tower, and the tower's config; `config` has all fields of its class."""
    tower = _TOWERS.get(config["model_type"], Tower())
    return tower, config.get(tower.field) or {}


def why_no_tower(config: Mapping[str, Any]) -> str | None:
    """Return why the tower of a wrapper cannot be folded, and None where it can."""
    tower, inner = tower_of(config)
    family = _family(inner)
    if family is None:
        known = sorted(name for kind in _KINDS for name in kind.model_types)
        return (
            f"{tower.field}: expected a tower of {listed(known, len(known))}, got {inner.get('model_type')!r:.60}, whose attention "
            "headfold does not know"
        )
    for setting, reason in family.refuses.items():
        if value := read_field(family, inner, setting):
            return f"{tower.field}: {inner['model_type']} with {setting}={value!r} cannot be folded exactly: {reason}"
    return None


def tower_sites(config: Mapping[str, Any], tensors: Mapping[str, Any], where: str) -> list[Site]:
    """Return the attention sites of a wrapper's tower, which are optional; `config` has all fields of its class.

    `tensors` are those on disk by name, each with a `shape`. Sites are named by what the tower reads: `vision.3.self`, `audio.3.self`.

    Raises:
        UserError: a tower whose attention is not known, or that lacks tensors which its literal names.
    """
    if reason := why_no_tower(config):
        raise UserError(f"{where}: --encoder: {reason}; leave it out, and the language model alone is folded")
    tower, inner = tower_of(config)
    family = _family(inner)
    assert family is not None  # `why_no_tower` has seen to that
    (attention,) = family.attentions
    name = f"{tower.stack}.{{layer}}.self"
    family = replace(family, attentions=(replace(attention, name=name, stack=tower.stack, optional=True),))
    first = attention.at.split(".")[1]
    usual, *others = (f"{outer}{tower.body}.{part}" for outer in ("model.", "") for part in _INNER)
    found = (prefix for prefix in (usual, *others) if any(one.startswith(f"{prefix}{first}.") for one in tensors))
    module = f"{tower.body}." if is_base_model(config) else f"model.{tower.body}."
    return sites(family, inner, tensors, where, Place(next(found, usual), module))


def check_tower_runs(name: str, chosen: Sequence[Site], kind: str | None) -> None:
    """Refuse to fold a tower on data that do not pass it, as it would be neither measured nor verified.

    `name` is that of the model, `chosen` are the sites to fold, `kind` is that of the calibration data, None where there are none.

    Raises:
        UserError: one of the sites is in a tower, and the data are text.
    """
    columns = columns_of_tower(chosen)
    if columns and kind in (None, "text", "texts"):
        data = "images with texts" if columns.startswith("IMAGE") else "sound with texts"
        raise UserError(
            f"{name}: --encoder: expected {data}, on which the tower runs, got {'no data' if kind is None else 'text'}; pass "
            f"--calibration SOURCE --columns {columns}, or leave --encoder out"
        )


def columns_of_tower(chosen: Sequence[Site]) -> str:
    """Return the kinds of columns of the data on which the tower among these sites runs; an empty text where there is none."""
    stack = next((site.stack for site in chosen if site.optional), None)
    return "" if stack is None else "IMAGE,TEXT" if stack == VISION else "AUDIO,TEXT"


def _family(inner: Mapping[str, Any]) -> Family | None:
    return next((kind for kind in _KINDS if inner.get("model_type") in kind.model_types), None)
