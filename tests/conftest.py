"""What all tests share: quiet transformers, checked annotations, and the tiny models of `tiny.py` as fixtures."""

import os
from collections.abc import Iterator

import jaxtyping
import pytest
import torch
import transformers.modeling_utils  # noqa: F401 - what a module under the hook imports first is compiled anew in every process
import typechecking

jaxtyping.jaxtyped = typechecking.jaxtyped  # which the hook decorates everything with
jaxtyping.install_import_hook("headfold", "typechecking.check")

import rounds  # noqa: E402, F401 - few of them, in this process
from tiny import FLOAT32_NORMS, TINY, stock_logits, stock_model, tiny_checkpoint, tiny_tokens  # noqa: E402

__all__ = ["FLOAT32_NORMS", "TINY", "stock_logits", "stock_model", "tiny_checkpoint", "tiny_tokens"]

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    """Library code takes seeds; this one makes what tests draw themselves repeatable."""
    torch.default_generator.manual_seed(0)
    yield


@pytest.fixture(autouse=True)
def _numbers_of_xglm(request: pytest.FixtureRequest) -> Iterator[None]:
    """XGLM's stock attention compares logits with a number of torch's default dtype, which has none as low as float64's lowest."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64 if "xglm" in request.node.name else before)
    yield
    torch.set_default_dtype(before)
