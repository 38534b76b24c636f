"""The decode kernel in C++: exact on every shape and layout, silent about nothing, and never needed."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from grades import assert_bitwise
from hypothesis import given, settings
from hypothesis import strategies as st
from test_decoding import drawn, in_float64
from torch import Tensor

from headfold.runtime import decoding, kernel

needs_kernel = pytest.mark.skipif(not kernel.library()[0], reason=f"no decode kernel here: {kernel.library()[1]}")


@needs_kernel
@settings(max_examples=150, deadline=None)
@given(
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    batch=st.integers(1, 3),
    groups=st.integers(1, 3),
    rows=st.integers(1, 11),
    keys=st.one_of(st.integers(1, 5), st.integers(60, 70), st.integers(500, 1100)),
    pairs=st.integers(1, 5),
    mask=st.sampled_from(["none", "keys", "rows", "nothing", "bias", "bias of all heads"]),
    layout=st.sampled_from(["plain", "room", "by token"]),
    threads=st.integers(1, 3),
)
def test_the_kernel_is_exact(
    dtype: torch.dtype, batch: int, groups: int, rows: int, keys: int, pairs: int, mask: str, layout: str, threads: int
) -> None:
    dim = pairs * kernel.library()[0].headfold_width()
    query = (3 * drawn(batch, groups, rows, dim)).to(dtype)
    key, value = (laid_out(drawn(batch, groups, keys, dim, seed=s).to(dtype), layout) for s in (1, 2))
    given_mask = {
        "none": lambda: None,
        "keys": lambda: drawn(batch, 1, 1, keys) > 0,
        "rows": lambda: drawn(batch, groups, rows, keys) > 0,
        "nothing": lambda: torch.zeros(batch, 1, 1, keys, dtype=torch.bool),
        "bias": lambda: (5 * drawn(1, groups, rows, keys)).to(dtype),
        "bias of all heads": lambda: (5 * drawn(batch, 1, rows, keys)).to(dtype),
    }[mask]()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found, _ = kernel.kernel(None, query, key, value, given_mask, scaling=0.3)
    finally:
        torch.set_num_threads(before)
    exact = in_float64(query, key, value, given_mask)
    assert found.dtype == dtype and found.shape == exact.shape
    # Sums of positive weights and bounded values in float32, and one rounding to the dtype at the end.
    assert (found - exact).abs().max() <= (1e-5 + torch.finfo(dtype).eps / 2) * value.abs().max()


def laid_out(states: Tensor, layout: str) -> Tensor:
    """The same numbers as caches hold them: the beginning of a larger room, or tokens outside heads."""
    if layout == "room":
        return torch.cat([states, torch.full_like(states, torch.nan)], 2)[:, :, : states.shape[2]]
    return states.transpose(1, 2).contiguous().transpose(1, 2) if layout == "by token" else states


@needs_kernel
@pytest.mark.parametrize("change", ["columns apart", "other width of values", "gradients"])
def test_what_the_kernel_cannot_take_goes_to_the_fused_one(change: str) -> None:
    query, key, value = (drawn(1, 2, n, 32, seed=n).float() for n in (3, 40, 40))
    if change == "columns apart":
        key = key.mT.contiguous().mT
    elif change == "other width of values":
        value = value[..., :16]
    else:
        key.requires_grad_()
        assert decoding.choose(query, key, value, None) is decoding.sdpa
        return
    found, _ = kernel.kernel(None, query, key, value, None, scaling=0.3)
    torch.testing.assert_close(found.double(), in_float64(query, key, value, None), rtol=1e-5, atol=1e-5)


@needs_kernel
def test_masks_of_one_number_count_for_all_keys_and_short_ones_are_refused() -> None:
    query, key, value = (drawn(1, 2, n, 32, seed=n).float() for n in (3, 40, 41))
    value = value[:, :, :40]
    found, _ = kernel.kernel(None, query, key, value, torch.zeros(1, 1, 1, 1), scaling=0.3)
    torch.testing.assert_close(found.double(), in_float64(query, key, value, None), rtol=1e-5, atol=1e-5)
    with pytest.raises(RuntimeError):
        kernel.kernel(None, query, key, value, torch.zeros(1, 1, 1, 7))


@needs_kernel
@pytest.mark.parametrize("where", ["query", "key", "value", "mask"])
def test_the_kernel_hides_no_nan(where: str) -> None:
    states = {
        "query": drawn(1, 1, 1, 32).float(),
        "key": drawn(1, 1, 70, 32).float(),
        "value": drawn(1, 1, 70, 32).float(),
    }
    states["mask"] = torch.zeros(1, 1, 1, 70)
    states[where].flatten()[-1] = torch.nan
    assert kernel.kernel(None, *states.values())[0].isnan().any()


@needs_kernel
def test_the_kernel_does_not_heed_the_default_dtype() -> None:
    query, key, value = (drawn(1, 2, n, 32, seed=n).float() for n in (3, 40, 40))
    mask = drawn(1, 1, 1, 40) > 0
    expected, _ = kernel.kernel(None, query, key, value, mask)
    torch.set_default_dtype(torch.bfloat16)
    try:
        found, _ = kernel.kernel(None, query, key, value, mask)
    finally:
        torch.set_default_dtype(torch.float32)
    assert_bitwise(found, expected)


@needs_kernel
def test_the_kernel_refuses_what_no_call_of_it_takes() -> None:
    for query in (drawn(1, 2, 3, 32), drawn(1, 2, 3, 32).half(), drawn(1, 2, 3, 24).float()):
        with pytest.raises(decoding.Unsuited, match="float16|float64|heads of 24"):
            kernel.kernel(None, query, query, query, None)


@pytest.fixture
def fresh_kernel(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[pytest.MonkeyPatch]:
    """Nothing is built yet, and nothing of what happens here stays."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    kernel.library.cache_clear()
    yield monkeypatch
    kernel.library.cache_clear()
    decoding.fastest.cache_clear()


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [("CXX", "no-such-compiler", "no-such-compiler"), ("CXX", "false", "false failed"), ("HEADFOLD_KERNEL", "0", "HEADFOLD_KERNEL=0")],
)  # fmt: skip
def test_without_a_compiler_the_others_decode(
    fresh_kernel: pytest.MonkeyPatch, tmp_path: Path, name: str, value: str, reason: str
) -> None:
    fresh_kernel.setenv(name, value)
    decoding.fastest.cache_clear()
    assert kernel.library()[0] is None
    query, key = torch.randn(2, 2, 4, 32), torch.randn(2, 2, 100, 32)
    assert decoding.choose(query, key, key, None) in (decoding.sdpa, decoding.matmuls)
    assert reason in decoding.TIMINGS[-1].unsuited["kernel"] and reason in str(decoding.TIMINGS[-1])
    assert not list(tmp_path.rglob("*.so"))


@needs_kernel
def test_the_kernel_is_built_once(fresh_kernel: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert kernel.library()[0]
    (built,) = (path for path in tmp_path.rglob("*") if path.is_file())
    kernel.library.cache_clear()
    written = built.stat().st_mtime_ns
    assert kernel.library()[0] and built.stat().st_mtime_ns == written


def planted(folder: Path, where: str) -> None:
    """Let others write to a place that the kernel is kept in, or put a link there."""
    caches = folder / "headfold"
    (built,) = caches.glob("*.so")
    if where == "a link":
        built.rename(folder / "other.so")
        built.symlink_to(folder / "other.so")
    else:
        {"parent": folder, "directory": caches, "library": built}[where].chmod(0o777)


@needs_kernel
@pytest.mark.parametrize("where", ["parent", "directory", "library", "a link"])
def test_code_that_others_could_have_written_is_not_run(
    fresh_kernel: pytest.MonkeyPatch, tmp_path: Path, where: str
) -> None:
    assert kernel.library()[0] and not (tmp_path / "headfold").stat().st_mode & 0o077
    planted(tmp_path, where)
    kernel.library.cache_clear()
    built, reason = kernel.library()
    assert built is None and "other users can write there" in reason


@needs_kernel
def test_a_library_of_something_else_is_no_kernel(fresh_kernel: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fresh_kernel.setattr(kernel, "SOURCE", tmp_path / "other.cpp")
    (tmp_path / "other.cpp").write_text('extern "C" int other() { return 1; }\n')
    built, reason = kernel.library()
    assert built is None and "undefined symbol" in reason  # not a traceback
