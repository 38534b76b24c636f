"""The check of annotations in the tests: types and shapes of what functions of headfold take and return."""

from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))
"""An int is a float here, as PEP 484 has it."""

ROOMS = (
    "core", "checkpoint", "parallel", "families", "hf_models", "measure", "group", "merge", "corpus", "calibration", "planning", "surgery",
    "budget", "runtime.routes", "runtime.routing", "detect", "train", "timing", "exports",
)  # fmt: skip
"""Where annotations are checked."""
