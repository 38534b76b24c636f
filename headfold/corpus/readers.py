"""What turns items into a model's inputs: the tokenizer, image processor or feature extractor of its directory."""

from pathlib import Path
from typing import Any

from ..core.errors import UserError
from ..stock import open_tokenizer, quiet

PROCESSORS = ("preprocessor_config.json", "processor_config.json")


def open_processor(kind: str, path: str | Path) -> Any:
    """The image processor ("images", on pillow and numpy) or feature extractor ("audio") in a checkpoint directory.

    Raises:
        UserError: there is none, or it does not load.
    """
    from transformers import AutoFeatureExtractor, AutoImageProcessor

    if not any((Path(path) / name).is_file() for name in PROCESSORS):
        raise UserError(f"{path}: expected the model's processor (preprocessor_config.json), found none; copy it there")
    auto, options = (AutoImageProcessor, {"backend": "pil"}) if kind == "images" else (AutoFeatureExtractor, {})
    try:
        with quiet():
            return auto.from_pretrained(path, local_files_only=True, trust_remote_code=False, **options)
    except Exception as error:  # half a dozen types, by what is wrong with it
        line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{path}: the processor does not load: {line}") from error


__all__ = ["open_processor", "open_tokenizer"]
