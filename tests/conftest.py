"""What all tests share: quiet transformers, checked annotations, and the tiny models of `tiny.py` as fixtures."""

import os
from collections.abc import Iterator

import jaxtyping
import pytest
import torch
from typechecking import ROOMS

jaxtyping.install_import_hook([f"headfold.{room}" for room in ROOMS], "typechecking.check")

from tiny import FLOAT32_NORMS, TINY, stock_logits, stock_model, tiny_checkpoint, tiny_tokens  # noqa: E402

__all__ = ["FLOAT32_NORMS", "TINY", "stock_logits", "stock_model", "tiny_checkpoint", "tiny_tokens"]

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


def pytest_configure(config: pytest.Config) -> None:
    # beartype draws which items of a container it checks; that changes nothing that a strategy makes.
    config.addinivalue_line("filterwarnings", "ignore:Do not use the `random` module inside strategies")


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    """Library code takes seeds; this one makes what tests draw themselves repeatable."""
    torch.manual_seed(0)
    yield
