"""The low-latency benchmark's own arithmetic, arguments and JSON; no figure is judged here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import bench_low_latency
from low_latency.measure import percentile
from low_latency.report import build_result, floor_us, print_result

SCRIPT = Path(bench_low_latency.__file__)
FLOORS = {
    "flags": {"0": {"median_us": 1.5}, "7168": {"median_us": 2.5}},
    "link": {"bytes": 1 << 20, "gb_s": 350.0},
    "note": "",
}


def figure(**changes):
    times = {"median_us": 10.0, "min_us": 9.0, "p25_us": 9.5, "p75_us": 10.5, "p50_us": 11.0, "p99_us": 13.0}
    case = {"key": "pair", "name": "dispatch + combine", "tokens": 8, "format": "fp8", "called_us": 30.0}
    return {**case, **times, "bytes_over_link": 700_000, "trips": 2, **changes}


def test_default_arguments_are_the_published_case():
    args = bench_low_latency.parse_args([])
    assert args.tokens == [1, 8, 32, 64, 128, 256, 512]
    assert (args.ranks, args.hidden, args.topk, args.experts, args.formats) == (2, 7168, 8, 256, ["fp8", "bf16"])


def test_arguments_are_read_and_the_command_names_no_folder():
    given = ["--tokens", "1,16", "--formats", "bf16", "--max-tokens", "64", "--json", "some/where/out.json"]
    args = bench_low_latency.parse_args(given)
    assert (args.tokens, args.formats, args.max_tokens) == ([1, 16], ["bf16"], 64)
    assert args.command[-1] == "out.json"


@pytest.mark.parametrize(
    "given",
    [
        ["--tokens", "0"],
        ["--tokens", "1,x"],
        ["--formats", "fp4"],
        ["--topk", "9", "--experts", "8"],
        ["--hidden", "200"],
    ],
)
def test_wrong_arguments_are_refused(given, capsys):
    with pytest.raises(SystemExit):
        bench_low_latency.parse_args(given)
    assert "expected" in capsys.readouterr().err


@pytest.mark.parametrize(("count", "p50", "p99"), [(1, 1, 1), (2, 1, 2), (100, 50, 99), (1000, 500, 990)])
def test_percentiles(count, p50, p99):
    values = [float(value) for value in range(1, count + 1)]
    assert (percentile(values, 0.5), percentile(values, 0.99)) == (p50, p99)


def test_floor_counts_flags_and_bytes():
    assert floor_us(figure(), FLOORS) == pytest.approx(2 * 1.5 + 0.7e6 / 350e3)
    assert floor_us(figure(), {**FLOORS, "link": None}) is None


@pytest.mark.parametrize("measured", [True, False])
def test_result_and_table(measured, capsys):
    args = bench_low_latency.parse_args(["--commit", "0123456789abcdef"])
    floors = FLOORS if measured else {"flags": {}, "link": None, "note": "no floors here"}
    host = [{"key": "pair", "name": "dispatch + combine", "format": "fp8", "tokens": 1, "median_us": 20.0}]
    result = build_result(args, "cuda", [figure(), figure(tokens=128)], host, floors, {"hint_bytes": 5}, "on")
    assert json.loads(json.dumps(result)) == result
    assert result["command"].startswith("python benchmarks/bench_low_latency.py")
    assert result["rows"][0]["ratio_to_floor"] == (2.0 if measured else None)
    print_result(result)
    shown = capsys.readouterr().out
    assert "dispatch + combine" in shown
    assert ("a flag, one way: 1.50 us" in shown) == measured
    assert ("no floors here" in shown) == (not measured)


def test_a_run_without_a_gpu(tmp_path):
    out = tmp_path / "out.json"
    sizes = ["--tokens", "1,5", "--hidden", "256", "--topk", "3", "--experts", "9"]
    effort = ["--iterations", "2", "--rounds", "2", "--samples", "3"]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *sizes, *effort, "--json", str(out)],
        env={"PATH": "/usr/bin:/bin", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    keys = {row["key"] for row in result["rows"]}
    hooks = {"dispatch_hook", "combine_hook", "pair_hook"}
    plain = {"dispatch", "combine", "pair"}
    assert keys == {*plain, *(f"{key}_source" for key in plain), *hooks, *(f"{key}_weights" for key in hooks)}
    assert {(row["tokens"], row["format"]) for row in result["rows"]} == {
        (t, f) for t in (1, 5) for f in ("fp8", "bf16")
    }
    for row in result["rows"]:
        assert 0 < row["p50_us"] <= row["p99_us"]
        assert 0 < row["min_us"] <= row["p25_us"] <= row["median_us"] <= row["p75_us"]
    assert not result["timings_meaningful"]
    assert {figure["key"] for figure in result["host"]} >= {*plain, "dispatch_out", "combine_async", "torch"}
    assert all(figure["median_us"] > 0 for figure in result["host"])
