"""What the native side sees of a low-latency call's tensors, and what it leaves to the detailed checks."""

import gc
import itertools
import weakref

import pytest
import torch

from deep_ep._native import _C
from deep_ep.engines.low_latency_call import ReceiveHook
from deep_ep.engines.low_latency_plans import PLACES, HandleShape, HandleTensors, maker_of

T, H, K, M, L, R = 3, 64, 2, 4, 5, 3
CPU = torch.device("cpu")
BF16 = torch.bfloat16


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


def odd(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Contiguous, but not at a multiple of 16 bytes."""
    size = torch.Size(shape).numel()
    result = torch.zeros(size + 16, dtype=dtype)
    start = 1 if result.data_ptr() % 16 == 0 else 0
    return result[start : start + size].view(shape)


def dispatch_inputs(is_int64: bool = True, with_weights: bool = False, tensor_type: type = torch.Tensor):
    return _C.LowLatencyDispatchInputs(tensor_type, -1, M, H, K, is_int64, with_weights, L, R)


def dispatch_tensors(num_tokens: int = T, **other: object) -> list[object]:
    given = {
        "x": torch.zeros((num_tokens, H), dtype=BF16),
        "topk_idx": torch.zeros((num_tokens, K), dtype=torch.int64),
        "topk_weights": None,
        "recv_stats": torch.zeros(L, dtype=torch.int32),
        "wait_stats": torch.zeros(R, dtype=torch.int64),
    }
    return list({**given, **other}.values())


@pytest.mark.parametrize("num_tokens", [0, 1, T, M])
def test_addresses_of_a_dispatch(num_tokens):
    x, idx, _, recv, wait = tensors = dispatch_tensors(num_tokens)
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


def combine_inputs(expert_major: bool = True, is_int64: bool = True, src_info_at: int = 256):
    groups, capacity = (L, R * M) if expert_major else (R, M)
    return _C.LowLatencyCombineInputs(
        torch.Tensor, -1, groups, capacity, H, M, K, is_int64, expert_major, src_info_at, R
    )


def combine_tensors(expert_major: bool = True, **other: object) -> list[object]:
    block = torch.zeros(4096, dtype=torch.int32)
    given = {
        "x": torch.zeros((L, R * M, H) if expert_major else (R, M, H), dtype=BF16),
        "src_info": block[64 : 64 + L * R * M].view(L, R * M),
        "layout_range": block.view(torch.int64)[: L * R].view(L, R) if expert_major else torch.zeros(0),
        "topk_idx": torch.zeros((T, K), dtype=torch.int64),
        "topk_weights": torch.ones((T, K)) if expert_major else None,
        "out": torch.zeros((T, H), dtype=BF16),
        "wait_stats": torch.zeros(R, dtype=torch.int64),
        "block": block.data_ptr(),
    }
    return list({**given, **other}.values())


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


# ---------------------------------------------------------------------------------------------------------------
# Native methods without pybind11's conversion of arguments


def test_wrong_arguments_of_native_methods_are_type_errors():
    read = combine_inputs().read
    good = combine_tensors()
    for wrong in ([], good[:-1], [*good, None]):
        with pytest.raises(TypeError, match=rf"read\(\) takes 8 arguments but {len(wrong)} were given"):
            read(*wrong)
    for value in (-1, 1 << 64, 1.0, "1", None, torch.zeros(1)):
        with pytest.raises(TypeError, match=r"read\(\) argument 8 is .*, of the wrong type"):
            read(*good[:-1], value)
    with pytest.raises(TypeError, match="keyword"):
        read(x=good[0])
    assert read(*good[:-1], (1 << 64) - 1) is None
    assert read(*good) is not None


def test_native_methods_keep_their_object():
    inputs = dispatch_inputs()
    read, life = inputs.read, weakref.ref(inputs)
    del inputs
    gc.collect()
    assert life() is not None
    assert read(*dispatch_tensors()) is not None
    del read
    gc.collect()
    assert life() is None


# ---------------------------------------------------------------------------------------------------------------
# What a call makes


@pytest.mark.parametrize("device", [CPU, torch.device("meta")])  # with and without a function of its own
@pytest.mark.parametrize("dtype", [BF16, torch.float8_e4m3fn, torch.int64])
def test_new_tensors(device, dtype):
    made = maker_of(device)((2, 3, 5), (15, 1, 3), dtype)
    like = torch.empty_strided((2, 3, 5), (15, 1, 3), dtype=dtype, device=device)
    for have, want in ((made, like), (maker_of(device)((0, 5), (5, 1), dtype), like.new_empty((0, 5)))):
        assert (have.shape, have.stride(), have.dtype, have.device) == (
            want.shape,
            want.stride(),
            want.dtype,
            want.device,
        )
    assert made.is_leaf
    assert not made.requires_grad
    with torch.inference_mode():
        assert maker_of(device)((2,), (1,), dtype).is_inference()


@pytest.mark.parametrize("expert_major", [True, False])
@pytest.mark.parametrize("inference", [True, False])
def test_small_tensors_of_handles(expert_major, inference):
    """Ordinary tensors that share nothing but their slab, which lives as long as one of them."""
    shape = HandleShape.of(K, M, H, L * R, True, expert_major, R, 0)
    handles = HandleTensors(CPU, _C.LowLatencyOutputs(L, R, M, K, True, expert_major), shape, R)
    with torch.inference_mode(inference):
        taken = [handles.take(0, False) for _ in range(70)]
    spans = []
    for count, info, ranges, places in taken:
        assert getattr(info, PLACES) == places
        assert places[0] is shape
        assert info.data_ptr() == places[1] + shape.src_info_at
        assert ranges.data_ptr() == places[1] + (0 if expert_major else shape.weights_at)
        for tensor in (count, info, ranges):
            assert tensor.is_contiguous()
            assert not tensor.is_inference()
            assert not tensor._is_view()
            assert tensor._version == 0
            tensor.fill_(1)
            assert tensor._version == 1
            spans.append((tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes))
    spans.sort()
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))
    kept = taken[0][0]
    kept.fill_(7)
    del taken, count, info, ranges, tensor
    for _ in range(70):
        handles.take(0, False)[1].fill_(9)
    assert kept.tolist() == [7] * len(kept)


def test_a_hook_lets_go_of_what_it_kept():
    calls = []

    def fail() -> None:
        raise ValueError("once")

    for finish, arguments in ((lambda *given: calls.append(given), (1, 2)), (fail, ())):
        kept = torch.zeros(1)
        life = weakref.ref(kept)
        hook = ReceiveHook(finish, *arguments, kept=kept)
        del kept
        assert hook.pending
        assert life() is not None
        if finish is fail:
            with pytest.raises(ValueError, match="once"):
                hook()
        else:
            hook()
        assert not hook.pending
        assert life() is None
        hook()
    assert calls == [(1, 2)]
