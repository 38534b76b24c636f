"""MusicGen: refused, because headfold has no data for it."""

from .spec import Family

FAMILY = Family(
    model_types=("musicgen", "musicgen_decoder", "musicgen_melody", "musicgen_melody_decoder"),
    refuses={"*": "its decoder reads codes of sound, for which there is no source of calibration data"},
)
