"""What the native side sees of a low-latency call's tensors, and what it leaves to the detailed checks."""

from typing import Any

import pytest
import torch
from low_latency_calls import (
    BF16,
    FP8_ROWS,
    ROWS,
    SCALES,
    CombineCalls,
    DispatchCalls,
    H,
    K,
    L,
    M,
    R,
    T,
    combine_tensors,
    dispatch_tensors,
    odd,
)


class Derived(torch.Tensor):
    pass


class Lookalike:
    """Answers as a tensor does."""

    dtype, shape = BF16, (T, H)

    def data_ptr(self) -> int:
        return 1 << 20

    def get_device(self) -> int:
        return -1

    def is_contiguous(self) -> bool:
        return True


def dispatch_inputs(is_int64: bool = True, with_weights: bool = False, tensor_type: type = torch.Tensor):
    return DispatchCalls(is_int64, with_weights, tensor_type)


@pytest.mark.parametrize("num_tokens", [0, 1, T, M])
def test_addresses_of_a_dispatch(num_tokens):
    x, idx, _, recv, wait, _ = tensors = dispatch_tensors(num_tokens)
    have = dispatch_inputs().read(*tensors)
    assert have == (x.data_ptr(), idx.data_ptr(), 0, num_tokens, recv.data_ptr(), wait.data_ptr())
    none = dispatch_tensors(num_tokens, recv_stats=None, wait_stats=None)
    assert dispatch_inputs().read(*none)[4:] == (0, 0)
    weights = torch.ones((num_tokens, K))
    have = dispatch_inputs(with_weights=True).read(*dispatch_tensors(num_tokens, topk_weights=weights))
    assert have[2] == weights.data_ptr()
    small = dispatch_tensors(num_tokens, topk_idx=idx.int())
    assert dispatch_inputs().read(*small) is None
    assert dispatch_inputs(is_int64=False).read(*small)[1] == small[1].data_ptr()


@pytest.mark.parametrize(
    "wrong",
    [
        {"x": None},
        {"x": [[0.0] * H] * T},
        {"x": Lookalike()},
        {"x": torch.zeros((T, H), dtype=BF16).as_subclass(Derived)},
        {"x": torch.zeros((T, H), dtype=BF16, device="meta")},
        {"x": torch.zeros((T, H), dtype=BF16).to_sparse()},
        {"x": torch.zeros((T, H), dtype=torch.float16)},
        {"x": torch.zeros((T, H), dtype=torch.int16)},
        {"x": torch.zeros((T, H // 2), dtype=torch.float32)},
        {"x": torch.zeros((T + 1, H), dtype=BF16)},
        {"x": torch.zeros((T, 2 * H), dtype=BF16)},
        {"x": torch.zeros((T, 2 * H), dtype=BF16)[:, :H]},
        {"x": torch.zeros((H, T), dtype=BF16).t()},
        {"x": torch.zeros((1, H), dtype=BF16).expand(T, H)},
        {"x": torch.zeros((1, T, H), dtype=BF16)},
        {"x": torch.zeros(T * H, dtype=BF16)},
        {"x": torch.zeros((), dtype=BF16)},
        {"x": odd((T, H), BF16)},
        {"topk_idx": torch.zeros((T, K))},
        {"topk_idx": torch.zeros((T, K), dtype=torch.uint64)},
        {"topk_idx": torch.zeros((T, K + 1), dtype=torch.int64)},
        {"topk_idx": torch.zeros((K, T), dtype=torch.int64).t()},
        {"topk_idx": torch.zeros(T, dtype=torch.int64)},
        {"topk_weights": torch.ones((T, K))},
        {"recv_stats": torch.zeros(L, dtype=torch.int64)},
        {"recv_stats": torch.zeros(L + 1, dtype=torch.int32)},
        {"recv_stats": torch.zeros(2 * L, dtype=torch.int32)[::2]},
        {"recv_stats": odd((L,), torch.int32)},
        {"wait_stats": torch.zeros((R, 1), dtype=torch.int64)},
        {"wait_stats": 0},
        {"wait_stats": False},
    ],
    ids=lambda wrong: next(iter(wrong)),
)
def test_what_a_dispatch_kernel_cannot_take(wrong):
    assert dispatch_inputs().read(*dispatch_tensors(**wrong)) is None
    assert dispatch_inputs().read(*dispatch_tensors()) is not None


def rows_like(**other: Any) -> torch.Tensor:
    sizes, strides, dtype = {**dict(zip(("sizes", "strides", "dtype"), ROWS, strict=True)), **other}.values()
    return torch.empty_strided(sizes, strides, dtype=dtype)


def test_a_dispatch_writes_to_given_tensors():
    rows, scales = (torch.empty_strided(sizes, by, dtype=dtype) for sizes, by, dtype in (FP8_ROWS, SCALES))
    assert dispatch_inputs().read(*dispatch_tensors(out=rows_like())) is not None
    calls = DispatchCalls(rows=FP8_ROWS, scales=SCALES)
    assert calls.read(*dispatch_tensors(out=(rows, scales))) is not None
    assert calls.read(*dispatch_tensors()) is not None
    # What has one column of scales, or one row, has strides that say nothing.
    single = ((L, R * M, 1), (R * M, 1, R * M), torch.float32)
    other = torch.empty_strided((L, R * M, 1), (R * M, 1, 99), dtype=torch.float32)
    assert DispatchCalls(rows=FP8_ROWS, scales=single).read(*dispatch_tensors(out=(rows, other))) is not None
    # Checked before.
    recv_x = calls.calls.run((16, 32, 0, T, 0, 0, 48, 64), (rows, scales), False, None, None)[0]
    assert (recv_x[0] is rows, recv_x[1] is scales) == (True, True)
    assert calls.plan.launches[-1][4:6] == (48, 64)


@pytest.mark.parametrize(
    "out",
    [
        rows_like(dtype=torch.float16),
        rows_like(sizes=(L, R * M + 1, H)),
        rows_like(sizes=(L, R * M - 1, H)),
        rows_like(strides=(R * M * H, 1, R * M)),
        rows_like().flatten(),
        odd((L, R * M, H), BF16),
        rows_like().as_subclass(Derived),
        (rows_like(),),
        (rows_like(), None),
        0,
    ],
    ids=lambda out: f"{type(out).__name__}{list(getattr(out, 'shape', ()))}",
)
def test_outputs_that_a_dispatch_kernel_cannot_take(out):
    assert dispatch_inputs().read(*dispatch_tensors(out=out)) is None


def test_fp8_outputs_that_a_dispatch_kernel_cannot_take():
    rows, scales = (torch.empty_strided(sizes, by, dtype=dtype) for sizes, by, dtype in (FP8_ROWS, SCALES))
    calls = DispatchCalls(rows=FP8_ROWS, scales=SCALES)
    for out in (
        rows,
        (rows,),
        [rows, scales],
        (scales, rows),
        (rows, scales, scales),
        (rows, None),
        (rows.view(torch.uint8), scales),
        (rows, scales.contiguous()),
        (rows, scales.view(torch.int32)),
        (rows, scales[..., :2]),
    ):
        assert calls.read(*dispatch_tensors(out=out)) is None
    assert calls.read(*dispatch_tensors(out=(rows, scales))) is not None


@pytest.mark.parametrize(
    "weights",
    [
        None,
        1.0,
        torch.ones((T, K)).double(),
        torch.ones((T, K + 1)),
        torch.ones((T - 1, K)),
        torch.ones((K, T)).t(),
        odd((T, K), torch.float32),
    ],
    ids=lambda weights: type(weights).__name__,
)
def test_weights_that_a_dispatch_kernel_cannot_take(weights):
    assert dispatch_inputs(with_weights=True).read(*dispatch_tensors(topk_weights=weights)) is None


def test_more_tokens_than_agreed():
    assert dispatch_inputs().read(*dispatch_tensors(M + 1)) is None


def test_strides_of_single_rows_and_of_nothing_do_not_matter():
    single = torch.zeros((1, 2 * H), dtype=BF16)[:, :H]
    assert single.is_contiguous()
    assert dispatch_inputs().read(*dispatch_tensors(1, x=single))[0] == single.data_ptr()
    nothing = torch.zeros((2 * H, 0), dtype=BF16).t()[:, ::2]
    assert nothing.is_contiguous()
    assert dispatch_inputs().read(*dispatch_tensors(0, x=nothing)) is not None


def test_a_gradient_is_no_obstacle():
    x = torch.zeros((T, H), dtype=BF16, requires_grad=True)
    assert dispatch_inputs().read(*dispatch_tensors(x=x))[0] == x.data_ptr()
    with torch.inference_mode():
        assert dispatch_inputs().read(*dispatch_tensors()) is not None


def test_tensors_that_have_no_native_side_are_not_read():
    """As all are where torch does not carry the functions."""

    class Plain:
        pass

    class Odd:
        __dlpack_c_exchange_api__ = "no capsule"

    for tensor_type in (Plain, Odd):
        inputs = dispatch_inputs(tensor_type=tensor_type)
        assert inputs.read(*dispatch_tensors()) is None
        assert inputs.read(*dispatch_tensors(x=tensor_type())) is None


# ---------------------------------------------------------------------------------------------------------------
# Combine


def combine_inputs(expert_major: bool = True, is_int64: bool = True):
    return CombineCalls(expert_major, is_int64)


@pytest.mark.parametrize("expert_major", [True, False])
def test_addresses_of_a_combine(expert_major):
    tensors = combine_tensors(expert_major)
    x, info, ranges, idx, weights, out, wait, _ = tensors
    want = [t.data_ptr() for t in (x, info, ranges, idx)]
    weights_at = weights.data_ptr() if expert_major else 0
    inputs = combine_inputs(expert_major)
    assert inputs.read(*tensors) == (*want, weights_at, T, out.data_ptr(), wait.data_ptr())
    tensors[5] = tensors[6] = None
    assert inputs.read(*tensors) == (*want, weights_at, T, 0, 0)
    if expert_major:
        # Weights are read element by element.
        assert inputs.read(*tensors[:4], odd((T, K), torch.float32), *tensors[5:]) is not None
    else:
        assert inputs.read(*tensors[:4], "unused", *tensors[5:]) == (*want, 0, T, 0, 0)


@pytest.mark.parametrize(
    "wrong",
    [
        {"x": torch.zeros((L, R * M, H))},
        {"x": torch.zeros((L, R * M + 1, H), dtype=BF16)},
        {"x": torch.zeros((R * M, L, H), dtype=BF16).transpose(0, 1)},
        {"x": torch.zeros((L * R * M, H), dtype=BF16)},
        {"x": odd((L, R * M, H), BF16)},
        {"src_info": torch.zeros((L, R * M), dtype=torch.int32)},
        {"src_info": None},
        {"layout_range": torch.zeros((L, R), dtype=torch.int64)},
        {"layout_range": None},
        {"topk_idx": torch.zeros((T, K), dtype=torch.int32)},
        {"topk_idx": torch.zeros((M + 1, K), dtype=torch.int64)},
        {"topk_idx": torch.zeros((T, K - 1), dtype=torch.int64)},
        {"topk_weights": None},
        {"topk_weights": torch.ones((T + 1, K))},
        {"topk_weights": torch.ones((K, T)).t()},
        {"topk_weights": torch.ones((T, K)).double()},
        {"out": torch.zeros((T, H))},
        {"out": torch.zeros((T + 1, H), dtype=BF16)},
        {"out": torch.zeros((H, T), dtype=BF16).t()},
        {"out": odd((T, H), BF16)},
        {"out": torch.zeros((T, H), dtype=BF16).as_subclass(Derived)},
        {"wait_stats": torch.zeros(R)},
        {"block": 0},
    ],
    ids=lambda wrong: next(iter(wrong)),
)
def test_what_a_combine_kernel_cannot_take(wrong):
    assert combine_inputs().read(*combine_tensors(**wrong)) is None
    assert combine_inputs().read(*combine_tensors()) is not None
