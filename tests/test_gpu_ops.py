"""The CUDA kernels against the CPU loops, by bits, and against the torch operations that serve builds without them."""

import pytest
import torch

from deep_ep import fp8, ops
from deep_ep._native import _C

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device, or a torch built without CUDA"),
]

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
SIGNED = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@pytest.fixture(params=["kernels", "torch"], autouse=True)
def path(request, monkeypatch):
    """Both paths of a CUDA tensor."""
    if request.param == "torch":
        for module in (ops, fp8):
            monkeypatch.setattr(module, "use_kernels", lambda tensor: False)
    elif not _C.has_cuda:
        pytest.skip("deep_ep._C was built without nvcc")
    return request.param


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.cpu().contiguous().view(SIGNED[x.element_size()])


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))


def any_bits(shape, dtype: torch.dtype, seed: int) -> torch.Tensor:
    integer = SIGNED[torch.empty(0, dtype=dtype).element_size()]
    info = torch.iinfo(integer)
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(info.min, info.max, shape, generator=generator, dtype=torch.int64).to(integer).view(dtype)


def values(shape, dtype: torch.dtype, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator) * torch.randn(shape, generator=generator).mul(3).exp()
    return x.to(dtype)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("scale_format", ["fp32", "pow2", "ue8m0"])
@pytest.mark.parametrize(
    "shape", [(0, 128), (1, 1), (1, 128), (3, 127), (5, 700), (64, 7168), (1000, 2048), (7, 16384)]
)
@pytest.mark.parametrize("make", [any_bits, values])
def test_quantize_and_dequantize(dtype, scale_format, shape, make):
    x = make(shape, dtype, 1)
    for column_major in (False, True):
        q, scales = fp8.quantize_1x128(x, scale_format=scale_format, column_major=column_major)
        gpu_q, gpu_scales = fp8.quantize_1x128(x.cuda(), scale_format=scale_format, column_major=column_major)
        assert same(q, gpu_q) and same(scales, gpu_scales) and scales.stride() == gpu_scales.stride()
        for out in FLOATS:
            assert same(fp8.dequantize_1x128(q, scales, dtype=out), fp8.dequantize_1x128(gpu_q, gpu_scales, dtype=out))


@pytest.mark.parametrize("dtype", FLOATS)
def test_strided_and_misaligned(dtype):
    store = values((60, 1031), dtype, 2)
    gpu = store.cuda()
    for cut in (slice(1, 900), slice(3, 515), slice(8, 520), slice(0, 1024)):
        q, scales = fp8.quantize_1x128(store[:, cut])
        gpu_q, gpu_scales = fp8.quantize_1x128(gpu[:, cut])
        assert same(q, gpu_q) and same(scales, gpu_scales)
    for call in (fp8.quantize_transposed, fp8.quantize_128x128):
        assert all(same(a, b) for a, b in zip(call(store), call(gpu), strict=True))
    q, scales = fp8.quantize_128x128(store)
    assert same(fp8.dequantize_128x128(q, scales), fp8.dequantize_128x128(q.cuda(), scales.cuda()))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float8_e4m3fn, torch.bfloat16, torch.float32, torch.int64])
@pytest.mark.parametrize("width", [1, 3, 4, 16, 56, 2048, 7168])
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_gather(dtype, width, index_dtype):
    size = torch.empty(0, dtype=dtype).element_size()
    x = torch.randint(0, 256, (130, width * size), dtype=torch.uint8).view(dtype)
    for count in (0, 1, 77, 1000):
        index = torch.randint(0, 130, (count,), dtype=index_dtype)
        assert same(ops.gather_rows(x, index), ops.gather_rows(x.cuda(), index.cuda()))
    index = torch.randint(0, 130, (9,), dtype=index_dtype)
    if width > 3:
        target = torch.zeros(9, width + 5, dtype=torch.uint8, device="cuda").view(torch.uint8)
        source = x.view(torch.uint8)[:, 1:width]
        ops.gather_rows(source.cuda(), index.cuda(), target[:, 2 : width + 1])
        assert same(ops.gather_rows(source, index), target[:, 2 : width + 1])


def test_gather_outside_is_zero(path):
    if path == "torch":
        pytest.skip("torch checks indices with a device assertion")
    index = torch.tensor([0, -1, 5, 1], device="cuda")
    out = ops.gather_rows(torch.ones(5, 64, device="cuda"), index)
    assert out.sum(1).tolist() == [64, 0, 0, 64]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("out_dtype", FLOATS)
@pytest.mark.parametrize("round_every", [0, 1, 3])
@pytest.mark.parametrize(
    ("tokens", "columns", "hidden"), [(0, 2, 64), (1, 1, 1), (5, 8, 70), (33, 17, 2048), (300, 8, 7168)]
)
def test_reduce(dtype, out_dtype, round_every, tokens, columns, hidden):
    for make in (any_bits, values):
        parts = [make((n, hidden), dtype, n) for n in (torch.arange(columns) % 5 + 1).tolist()]
        limits = torch.tensor([part.shape[0] for part in parts])
        slots = ((torch.rand(tokens, columns) * (limits + 1)).int() - 1).clamp(max=limits.int() - 1)
        weights = torch.randn(tokens, columns)
        bias = [make((tokens, hidden), dtype, 90 + i) for i in range(2)]
        for weight, biases in ((None, ()), (weights, bias)):
            want = ops.reduce_rows(
                parts, slots, weights=weight, bias=biases, round_every=round_every, out_dtype=out_dtype
            )
            got = ops.reduce_rows(
                [part.cuda() for part in parts],
                slots.cuda(),
                weights=None if weight is None else weight.cuda(),
                bias=[tensor.cuda() for tensor in biases],
                round_every=round_every,
                out_dtype=out_dtype,
            )
            assert same(want, got)


def test_reduce_of_many_columns_and_strided_rows():
    x = values((40, 203), torch.bfloat16, 1)
    slots = torch.randint(-1, 40, (6, 150), dtype=torch.int32)
    assert same(ops.reduce_rows([x], slots), ops.reduce_rows([x.cuda()], slots.cuda()))
    few = slots[:, ::30]
    assert same(ops.reduce_rows([x[:, 3:90]], few), ops.reduce_rows([x.cuda()[:, 3:90]], few.cuda()))


def test_work_is_ordered_on_the_current_stream():
    x = torch.randn(4096, 2048, device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        y = x * 2
        q, scales = fp8.quantize_1x128(y)
        back = fp8.dequantize_1x128(q, scales)
    stream.synchronize()
    want = fp8.dequantize_1x128(*fp8.quantize_1x128((x * 2).cpu()))
    assert same(back, want)
