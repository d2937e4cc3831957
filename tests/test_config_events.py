"""`Config`, size hints, SM counts, events: parts of the interface that need no peers."""

import pytest
import torch

import deep_ep
from deep_ep import Buffer, Config, EventHandle, EventOverlap

# (ranks, nvl send, nvl recv, rdma send, rdma recv) of the published defaults.
DISPATCH_TABLE = [
    (2, 24, 256, 6, 128),
    (4, 6, 256, 6, 128),
    (8, 6, 256, 6, 128),
    (16, 36, 288, 20, 128),
    (24, 32, 288, 8, 128),
    (32, 32, 288, 8, 128),
    (48, 32, 288, 8, 128),
    (64, 32, 288, 8, 128),
    (96, 20, 480, 12, 128),
    (128, 20, 560, 12, 128),
    (144, 32, 720, 12, 128),
    (160, 28, 720, 12, 128),
]
COMBINE_TABLE = [
    (2, 10, 256, 6, 128),
    (4, 9, 256, 6, 128),
    (8, 4, 256, 6, 128),
    (16, 4, 288, 12, 128),
    (24, 1, 288, 8, 128),
    (32, 1, 288, 8, 128),
    (48, 1, 288, 8, 128),
    (64, 1, 288, 8, 128),
    (96, 1, 480, 8, 128),
    (128, 1, 560, 8, 128),
    (144, 2, 720, 8, 128),
    (160, 2, 720, 8, 128),
]


def align128(value: int) -> int:
    return -(-value // 128) * 128


def nvl_hint(num_sms: int, nvl_recv: int, hidden_bytes: int, num_ranks: int) -> int:
    channels, nodes, peers = num_sms // 2, max(num_ranks // 8, 1), min(num_ranks, 8)
    return align128(
        channels * peers * (2 * nodes + 3) * 4 + channels * peers * nvl_recv * (hidden_bytes + 8 + 128 * 8 + 512 + 512)
    )


def rdma_hint(num_sms: int, rdma_recv: int, hidden_bytes: int, num_ranks: int) -> int:
    if num_ranks <= 8:
        return 0
    channels, nodes = num_sms // 2, num_ranks // 8
    return align128(
        channels * nodes * 36 * 4 + 2 * channels * nodes * rdma_recv * (hidden_bytes + 8 + 128 * 8 + 512 + 512 + 16)
    )


def round_up(value: int, step: int) -> int:
    return -(-value // step) * step


@pytest.mark.parametrize("which", ["dispatch", "combine"])
def test_default_configs(which):
    table = DISPATCH_TABLE if which == "dispatch" else COMBINE_TABLE
    get = Buffer.get_dispatch_config if which == "dispatch" else Buffer.get_combine_config
    for num_ranks, _, nvl_recv, rdma_send, rdma_recv in table:
        config = get(num_ranks)
        assert isinstance(config, Config)
        for hidden_bytes in (32, 4096, 14336):
            assert config.get_nvl_buffer_size_hint(hidden_bytes, num_ranks) == nvl_hint(
                config.num_sms, nvl_recv, hidden_bytes, num_ranks
            )
            assert config.get_rdma_buffer_size_hint(hidden_bytes, num_ranks) == rdma_hint(
                config.num_sms, round_up(rdma_recv, rdma_send), hidden_bytes, num_ranks
            )


@pytest.mark.parametrize("num_ranks", [1, 3, 5, 6, 7, 12, 20, 40, 72, 256])
def test_configs_exist_for_any_rank_count(num_ranks):
    for get in (Buffer.get_dispatch_config, Buffer.get_combine_config):
        config = get(num_ranks)
        assert config.get_nvl_buffer_size_hint(14336, num_ranks) > 0
        assert config.get_nvl_buffer_size_hint(14336, num_ranks) % 128 == 0
        assert (config.get_rdma_buffer_size_hint(14336, num_ranks) > 0) == (num_ranks > 8)


def test_published_example():
    # EP8, 20 SMs, 256 slots, hidden 7168 in bf16: about 336 MB.
    assert Config(20, 6, 256, 6, 128).get_nvl_buffer_size_hint(7168 * 2, 8) == pytest.approx(336e6, rel=0.01)


def test_config_arguments():
    assert Config().get_nvl_buffer_size_hint(128, 2) == Config(20, 6, 256, 6, 256).get_nvl_buffer_size_hint(128, 2)
    keywords = Config(
        num_sms=8,
        num_max_nvl_chunked_send_tokens=4,
        num_max_nvl_chunked_recv_tokens=32,
        num_max_rdma_chunked_send_tokens=7,
        num_max_rdma_chunked_recv_tokens=50,
    )
    assert keywords.get_nvl_buffer_size_hint(256, 4) == nvl_hint(8, 32, 256, 4)
    assert keywords.get_rdma_buffer_size_hint(256, 16) == rdma_hint(8, 56, 256, 16), (
        "rounded up to a multiple of the sent chunk"
    )
    assert isinstance(keywords.get_nvl_buffer_size_hint(256, 4), int)


def test_num_sms_is_class_wide():
    before = Buffer.num_sms
    try:
        Buffer.set_num_sms(24)
        assert Buffer.num_sms == 24
        assert Buffer.get_dispatch_config(8).get_nvl_buffer_size_hint(1024, 8) == nvl_hint(24, 256, 1024, 8)
    finally:
        Buffer.set_num_sms(before)


def test_hint_follows_the_domain(monkeypatch):
    monkeypatch.setenv("DEEP_EP_NVL_DOMAIN", "2")
    assert Config().get_rdma_buffer_size_hint(1024, 4) > 0
    monkeypatch.setenv("DEEP_EP_NVL_DOMAIN", "4")
    assert Config().get_rdma_buffer_size_hint(1024, 4) == 0


def test_event_handle_and_overlap():
    handle = EventHandle()
    handle.current_stream_wait()
    handle.current_stream_wait()
    empty = EventOverlap()
    assert empty.event is None
    assert empty.extra_tensors is None
    tensors = (torch.zeros(1),)
    event = EventOverlap(handle, tensors)
    assert event.event is handle
    assert event.extra_tensors is tensors
    event.current_stream_wait()
    event.current_stream_wait()
    other = EventOverlap(None)
    other.event = event.event
    other.current_stream_wait()


def test_event_as_a_context():
    ran = []
    with EventOverlap(EventHandle()) as entered:
        ran.append(entered)
    assert isinstance(ran[0], EventOverlap)
    with EventOverlap():  # nothing to wait for: no error
        pass
    event = EventOverlap(EventHandle())
    assert event() is event
    with event(release_handle=True):
        pass
    assert event.event is None


def test_event_hook_runs_once_after_the_wait():
    ran = []
    event = EventOverlap(EventHandle())
    event.register_hook_after_wait(lambda: ran.append(1))
    with pytest.raises((AssertionError, deep_ep.ConfigError)):
        event.register_hook_after_wait(lambda: ran.append(2))
    assert ran == []
    event.current_stream_wait()
    assert ran == [1]
    event.current_stream_wait(release_handle=True)
    assert ran == [1]
    assert event.event is None


def test_waiting_on_nothing_is_an_error():
    with pytest.raises((AssertionError, deep_ep.ConfigError)):
        EventOverlap().current_stream_wait()


def test_capture_is_static_and_an_instance_method():
    assert isinstance(Buffer.capture(), EventOverlap)
    buffer = Buffer(None, comm=deep_ep.SoloComm())
    assert buffer.capture().event is not None


@pytest.mark.gpu
def test_comm_stream():
    buffer = Buffer(None, comm=deep_ep.SoloComm())
    with torch.cuda.stream(buffer.get_comm_stream()):
        torch.zeros(1, device="cuda")
