"""Language models inside wrappers: models that put images or sound before a decoder of a known family, and nest its config.

A wrapper has no attention of its own that is cached, so all that is known of it is where its language model is: in the config, among the
tensors on disk, and among the modules of the running model. The literal of the language model says the rest.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ..core.errors import UserError

TEXT = "text_config"
VISION, AUDIO = "vision", "audio"
"""First parts of the names of sites in towers (`headfold.towers`)."""


@dataclass(frozen=True, slots=True)
class Wrapper:
    """One kind of wrapper."""

    inner: str
    """`model_type` of the language model where its config names none."""
    body: str = "language_model"
    """Name of the language model among the wrapper's modules."""
    flat: bool = False
    """Whether published configs have the language model's fields beside the wrapper's own instead of in `text_config`."""


WRAPPERS: Mapping[str, Wrapper] = {
    "aya_vision": Wrapper("cohere2"),
    "gemma3": Wrapper("gemma3_text"),
    "idefics2": Wrapper("mistral", body="text_model"),
    "idefics3": Wrapper("llama", body="text_model"),
    "internvl": Wrapper("qwen2"),
    "llava": Wrapper("llama"),
    "llava_next": Wrapper("llama"),
    "llava_next_video": Wrapper("llama"),
    "llava_onevision": Wrapper("qwen2"),
    "mistral3": Wrapper("mistral"),
    "paligemma": Wrapper("gemma"),
    "qwen2_5_vl": Wrapper("qwen2_5_vl_text", flat=True),
    "qwen2_audio": Wrapper("qwen2"),
    "qwen2_vl": Wrapper("qwen2_vl_text", flat=True),
    "smolvlm": Wrapper("llama", body="text_model"),
    "vipllava": Wrapper("llama"),
    "voxtral": Wrapper("llama"),
}
"""By `model_type`, as `transformers` names them."""
_SAME_ATTENTION = {"qwen2_vl_text": "qwen2", "qwen2_5_vl_text": "qwen2"}
"""Language models that exist in wrappers alone → the type with the same attention. Their positions have three coordinates, each of which
turns some of the frequency planes: one complex number is free per plane, as with one coordinate."""


@dataclass(frozen=True, slots=True)
class Place:
    """What stands before `layers` in the names of the language model's tensors on disk and of its modules."""

    on_disk: str
    module: str


def is_wrapper(config: Mapping[str, Any]) -> bool:
    """Return whether a config is that of a wrapper whose language model can be found."""
    model_type = config.get("model_type")
    return isinstance(model_type, str) and model_type in WRAPPERS


def language_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the config of the language model inside a wrapper; of any other model its own.

    It has the fields that the wrapper's config gives it, which need not be all fields of its class.
    """
    if not is_wrapper(config):
        return config
    wrapper, inner = WRAPPERS[config["model_type"]], config.get(TEXT)
    if inner is None:
        return {**config, "model_type": wrapper.inner}
    return {**inner, "model_type": inner.get("model_type") or wrapper.inner}


def with_language_config(config: Mapping[str, Any], inner: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config with another config of its language model, the inverse of `language_config`.

    The sites of a fold are listed in the wrapper's own config, as that is the one that its class reads.
    """
    if not is_wrapper(config):
        return dict(inner)
    if config.get(TEXT) is None:
        return {**inner, "model_type": config["model_type"]}
    own = {name: value for name, value in inner.items() if name != "headfold"}
    listed = {"headfold": inner["headfold"]} if "headfold" in inner else {}
    return {**config, TEXT: own, **listed}


def attention_type(config: Mapping[str, Any]) -> Any:
    """Return the `model_type` by which the family of a model, or of the language model inside it, is known."""
    model_type = language_config(config).get("model_type")
    return _SAME_ATTENTION.get(model_type, model_type) if isinstance(model_type, str) else model_type


def is_in_language_model(model_type: Any, module: str) -> bool:
    """Return whether a module, given by its path, is in the language model of a wrapper; of any other model every module is."""
    wrapper = WRAPPERS.get(model_type)
    return wrapper is None or wrapper.body in module.split(".")


def seen_tokens(config: Mapping[str, Any]) -> frozenset[int]:
    """Return the tokens of a wrapper in whose place it puts images or sound; `config` has all fields of its class."""
    names = (f"{what}_token_{form}" for what in ("image", "video", "audio") for form in ("id", "index"))
    return frozenset(token for name in names if type(token := config.get(name)) is int)


def is_of_tower(site: str) -> bool:
    """Return whether a site of a wrapper, given by its name, is in the tower before the language model."""
    return site.partition(".")[0] in (VISION, AUDIO)


def check_wrapper(config: Mapping[str, Any], where: str) -> None:
    """Check that the config of a wrapper has that of its language model.

    Raises:
        UserError: it has none.
    """
    if is_wrapper(config) and config.get(TEXT) is None and not WRAPPERS[config["model_type"]].flat:
        raise UserError(
            f"{where}: {TEXT}: expected the config of the language model inside {config['model_type']}, got none; "
            "copy the model's own config.json there"
        )


def place_of(config: Mapping[str, Any], tensors: Iterable[str], *, is_base_model: bool) -> Place | None:
    """Return where the language model of a wrapper is; None for any other model.

    Checkpoints keep the names of the transformers version that wrote them, so those on disk decide. `is_base_model` says whether the
    class that saved the checkpoint has no head.
    """
    if not is_wrapper(config):
        return None
    body = WRAPPERS[config["model_type"]].body
    usual, *others = (f"model.{body}.", f"{body}.model.", f"{body}.", "model.")
    names = list(tensors)
    found = (prefix for prefix in (usual, *others) if any(name.startswith(f"{prefix}layers.") for name in names))
    return Place(next(found, usual), f"{body}." if is_base_model else usual)
