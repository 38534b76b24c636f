"""The check of annotations in the tests: types and shapes of what functions of headfold take and return."""

import random

from beartype import BeartypeConf, beartype
from beartype._check.code import codemain

# beartype checks one item of a container, drawn by the global generator, which tests and hypothesis watch: give it its own.
codemain.getrandbits = random.Random(0).getrandbits

check = beartype(conf=BeartypeConf(is_pep484_tower=True))
"""An int is a float here, as PEP 484 says."""

ROOMS = (
    "core", "checkpoint", "parallel", "families", "hf_models", "measure", "group", "merge", "corpus", "calibration", "planning", "surgery",
    "runtime.routes", "runtime.routing", "detection", "train", "timing", "exports", "conversion", "budget", "verbs",
)  # fmt: skip
"""Where annotations are checked."""
