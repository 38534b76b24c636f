"""The check of annotations in the tests: types and shapes of what functions of headfold take and return."""

import random
from io import TextIOBase
from typing import TextIO

from beartype import BeartypeConf, FrozenDict, beartype
from beartype._check.code import codemain
from torch import SymInt

# beartype checks one item of a container, drawn by the global generator, which tests and hypothesis watch: give it its own.
codemain.getrandbits = random.Random(0).getrandbits

check = beartype(
    conf=BeartypeConf(is_pep484_tower=True, hint_overrides=FrozenDict({TextIO: TextIOBase | TextIO, int: int | SymInt}))
)
"""An int is a float here, as PEP 484 says, and a StringIO is a TextIO, as the standard library's annotations say. While torch
traces a model, the sizes of tensors are integers of its own."""
