"""The limits that `bench_intranode.py` measures beside the calls: bare kernels in many shapes, each checked; flags."""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import dataclasses
import sys
import time
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

from intranode import limits, probes, world

from deep_ep._native import _C


class SoloWorld(world.World):
    """One rank without a group."""

    def __init__(self):
        self.rank, self.size, self.num_devices, self.device = 0, 1, 0, torch.device("cpu")
        self.args = argparse.Namespace(iterations=2, rounds=3)

    def gather(self, value):
        return [value]

    def barrier(self):
        pass


class HostMemory:
    """Peer memory of one rank, on the CPU: offsets are addresses."""

    def __init__(self, members, device, control_bytes, pool_bytes):
        self.bases = [0]

    def empty(self, shape, dtype):
        return torch.empty(shape, dtype=dtype)

    def offset_of(self, tensor):
        return tensor.data_ptr()

    def close(self):
        pass


class HostProbes:
    """The probes as copies of the CPU. Fewer stages take longer; `wrong` breaks what the peer receives."""

    def __init__(self, wrong: bool = False):
        self.wrong = wrong

    def probe_push(self, rows, num_rows, row_bytes, scales, scale_bytes, ahead, behind, **rest):
        time.sleep(2e-3 / (ahead + behind + 1))
        size, scale_size = num_rows * row_bytes - self.wrong, num_rows * scale_bytes
        for place in ("peer_rows", "own_rows"):
            if rest[place]:
                ctypes.memmove(rest[place], rows, size)
        for place in ("peer_scales", "own_scales"):
            if rest[place]:
                ctypes.memmove(rest[place], scales, scale_size)

    def probe_registers(self, source, target, bytes, **rest):
        ctypes.memmove(target, source, bytes)

    def probe_pull(self, peer_rows, own_rows, out, num_rows, row_bytes, **rest):
        size = num_rows * row_bytes
        theirs, own, target = (
            torch.frombuffer((ctypes.c_char * size).from_address(address), dtype=torch.bfloat16)
            for address in (peer_rows, own_rows, out)
        )
        total = (0.0 + theirs.float() + own.float()).bfloat16()
        total.view(torch.int16)[total.isnan()] = 0x7FC0
        target.copy_(total)


@pytest.fixture
def rig(monkeypatch):
    monkeypatch.setattr(probes, "PeerMemory", HostMemory)
    monkeypatch.setattr(probes, "_C", HostProbes())
    monkeypatch.setattr(probes, "current_stream", lambda device: 0)
    return probes.Rig(SoloWorld(), num_rows=9, row_bytes=256, scale_bytes=16)


def test_limit_is_the_fastest_shape(rig):
    by_key = {probe.key: probe for probe in probes.probes_of(256, 16)}
    shapes = [probes.Push(4, ahead, behind, 128) for ahead, behind in ((1, 0), (4, 3), (1, 1))]
    probe = dataclasses.replace(by_key["place_fp8_scales"], shapes=shapes)
    best = probes.best_of(rig, probe, 8)
    assert best["shape"] == str(shapes[1])
    assert best["bytes_over_link"] == 9 * (128 + 16)
    assert (best["key"], best["num_sms"]) == ("place_fp8_scales", 8)


@pytest.mark.parametrize("key", ["push_bf16", "place_fp8_scales", "pull_bf16", "store_16b", "load_16b"])
def test_limits_are_checked(rig, key, monkeypatch):
    probe = {probe.key: probe for probe in probes.probes_of(256, 16)}[key]
    probe.launch(rig, probe.shapes[0], 8)
    probe.check(rig)
    rig.wipe()
    with pytest.raises(RuntimeError, match="bytes of"):
        probe.check(rig)


def test_a_limit_that_moved_other_bytes_is_no_limit(rig, monkeypatch):
    monkeypatch.setattr(probes, "_C", HostProbes(wrong=True))
    probe = dataclasses.replace(probes.probes_of(256, 16)[0], shapes=[probes.Push(4, 1, 1, 128)])
    with pytest.raises(RuntimeError, match="1 of 1152 bytes of rows are wrong"):
        probes.best_of(rig, probe, 8)


def test_a_machine_without_gpus_has_no_limits():
    found = limits.measure_limits(SoloWorld(), [100], 10, argparse.Namespace(sms=[8]))
    assert found == {"copy_engine": {}, "local_copy": None, "probes": [], "flags": {}, "note": ""}


def launch_probe(shape, **sizes):
    common = dict(num_rows=0, row_bytes=14336, num_sms=8, stream=0, **sizes)
    if isinstance(shape, probes.Push):
        places = dict.fromkeys(("rows", "peer_rows", "own_rows", "scales", "peer_scales", "own_scales"), 0)
        _C.probe_push(**places, scale_bytes=224 * shape.scales_by_bulk, **common, **dataclasses.asdict(shape))
    else:
        _C.probe_pull(peer_rows=0, own_rows=0, out=0, **common, **dataclasses.asdict(shape))


@pytest.mark.skipif(not _C.has_cuda, reason="needs a CUDA build")
def test_the_kernels_take_every_shape_and_no_other():
    """Without a device a launch that is in order fails in the runtime (RuntimeError); with one, no row is moved."""
    for shape in [*probes.push_shapes(14336, scales=True), *probes.pull_shapes()]:
        with contextlib.suppress(RuntimeError):
            launch_probe(shape)
    push, pull = next(probes.push_shapes(14336)), next(probes.pull_shapes())
    bad = [(push, {"warps": 17}), (push, {"behind": 4}), (push, {"ahead": 0}), (push, {"piece_bytes": 1 << 20})]
    bad += [(pull, {"warps": 0}), (pull, {"vectors": 5}), (pull, {"stages": 1}), (pull, {"stages": 9})]
    for shape, change in bad:
        with pytest.raises(ValueError, match="expected"):
            launch_probe(dataclasses.replace(shape, **change))


class RankWorld(world.World):
    def __init__(self, ctx):
        self.rank, self.size, self.group = ctx.rank, ctx.num_ranks, ctx.group
        self.args = argparse.Namespace(iterations=2, rounds=2)
        self.num_devices = torch.cuda.device_count()
        self.device = torch.device("cuda", ctx.rank % self.num_devices)
        torch.cuda.set_device(self.device)


def _try_all_shapes(ctx, row_bytes: int, scale_bytes: int) -> list[str]:
    """Every shape of every probe moves the right bytes; returns what did not."""
    rig = probes.Rig(RankWorld(ctx), 37, row_bytes, scale_bytes)
    nan, inf = float("nan"), float("inf")
    for tensor, values in ((rig.rows, [nan, -0.0, -0.0, inf, 1e-40, -nan]), (rig.own, [1.0, -0.0, 0.0, -inf, -1e-40])):
        tensor.view(-1)[: len(values)] = torch.tensor(values, device=tensor.device).bfloat16()
    wrong = []
    for probe in probes.probes_of(row_bytes, scale_bytes):
        for shape in probe.shapes:
            rig.wipe()
            probe.launch(rig, shape, 3)
            try:
                probe.check(rig)
            except RuntimeError as error:
                wrong.append(f"{probe.key} {shape}: {error}")
            rig.world.barrier()  # nobody wipes what another rank still compares
    rig.close()
    return wrong


@pytest.mark.gpu
@pytest.mark.parametrize(("row_bytes", "scale_bytes"), [(14336, 224), (2080, 16)])
def test_probes_move_the_right_bytes(run_ranks, row_bytes, scale_bytes):
    assert run_ranks(2, _try_all_shapes, row_bytes, scale_bytes) == [[], []]


def _flags(ctx) -> list[float]:
    rig = probes.Rig(RankWorld(ctx), 4, 512, 16)
    times = [rig.flags(size) for size in probes.FLAG_PAYLOADS for _ in range(2)]
    queued = rig.world.queued_microseconds(lambda: rig.own.mul_(1.0), 20)
    rig.close()
    return [*times, queued]


@pytest.mark.gpu(2)
def test_flags_come_back(run_ranks):
    for times in run_ranks(2, _flags):
        assert all(0.05 < us < 1000 for us in times)
