"""The benchmarks' own arithmetic, arguments and JSON, and the README's tables; no figure is judged here."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import bench_intranode
import readme_tables
from intranode import case as intranode_case
from intranode import mps, probes, workload, world
from intranode.report import build_result, print_result

ROOT = Path(__file__).resolve().parent.parent

ROW_FIELDS = {
    "key": str,
    "name": str,
    "num_sms": int,
    "kept": int,
    "median_us": float,
    "min_us": float,
    "p25_us": float,
    "p75_us": float,
    "bytes_over_link": int,
    "gb_s": float,
}
ROW_KEYS = [
    "fp8_dispatch_cached",
    "fp8_dispatch_inside",
    "bf16_dispatch_cached",
    "fp8_dispatch_uncached",
    "bf16_dispatch_uncached",
    "combine_symmetric",
    "combine_ordinary",
    "combine_weights",
    "fp8_dispatch_kept",
    "bf16_dispatch_kept",
    "fp8_dispatch_uncached_kept",
]


def figure(key: str = "fp8_dispatch_cached", num_sms: int = 8, median_us: float = 162.0, size: int = 30_000_000):
    spread = {"median_us": median_us, "min_us": median_us - 2, "p25_us": median_us - 1, "p75_us": median_us + 1}
    rate = round(size / median_us / 1e3, 2)
    names = {"key": key, "name": key.replace("_", " "), "num_sms": num_sms, "kept": 0}
    probe = workload.PROBE_OF[key.split("_", maxsplit=1)[0]]
    return {**names, **spread, "bytes_over_link": size, "gb_s": rate, "probe": probe, "queued_us": None}


def probe_figure(key: str = "place_fp8_scales", num_sms: int = 8, median_us: float = 108.0):
    return {**figure(num_sms=num_sms, median_us=median_us), "key": key, "name": key, "shape": "8w 1+1+1 stages of 7168"}


def intranode_result(device: str = "NVIDIA H200", ranks: int = 2, probe_figures=(), **limit):
    args = bench_intranode.parse_args(["--ranks", str(ranks), "--commit", "0123456789abcdef"])
    figures = [figure(num_sms=16, median_us=121.5), figure(), figure("combine_weights")]
    found = {"copy_engine": {"30000000": limit} if limit else {}, "local_copy": None, "note": ""}
    found.update(probes=list(probe_figures), flags={})
    result = build_result(args, "cuda", figures, [], found)
    # What this machine says of itself must not decide what the tables are tested on.
    versions = {"deep_ep": "0", "torch": "2.12", "cuda": "13.0", "python": "3"}
    result.update(device=device, num_devices=2, driver="580.1", date="2030-01-02T03:04:05+00:00", versions=versions)
    result.update(timings_meaningful=True, shared=False)
    return result


def check_schema(result: dict):
    """What readers of the JSON rely on."""
    assert result["benchmark"] == "bench_intranode"
    for name in ("engine", "device", "driver", "date", "commit", "command"):
        assert isinstance(result[name], str), name
        assert result[name]
    assert set(result["versions"]) == {"deep_ep", "torch", "cuda", "python"}
    assert isinstance(result["timings_meaningful"], bool)
    assert isinstance(result["num_devices"], int)
    assert {"ranks", "tokens", "hidden", "topk", "experts", "sms", "iterations", "rounds", "keep"} <= set(
        result["arguments"]
    )
    assert {"copy_engine", "local_copy", "note"} <= set(result["limits"])
    assert result["rows"]
    for row in result["rows"]:
        for name, kind in ROW_FIELDS.items():
            assert isinstance(row[name], kind), (name, row)
        assert 0 < row["min_us"] <= row["p25_us"] <= row["median_us"] <= row["p75_us"]
        limit = result["limits"]["copy_engine"].get(str(row["bytes_over_link"]))
        assert (row["limit_us"] is None) == (row["ratio_to_limit"] is None) == (limit is None)
        assert (row.get("probe_us") is None) == (row.get("ratio_to_probe") is None)


# Arguments


def test_default_arguments_are_the_published_case():
    args = bench_intranode.parse_args([])
    assert (args.ranks, args.tokens, args.hidden, args.topk, args.experts) == (2, 4096, 7168, 8, 256)
    assert (args.sms, args.iterations, args.rounds, args.keep) == ([8, 16, 24], 30, 5, 32)


def test_arguments_are_read_and_the_command_names_no_folder():
    args = bench_intranode.parse_args(
        ["--sms", "2,132", "--ranks", "8", "--keep", "0", "--json", "some/where/out.json"]
    )
    assert (args.sms, args.ranks, args.keep) == ([2, 132], 8, 0)
    assert args.command[-2:] == ["--json", "out.json"]


@pytest.mark.parametrize(
    "argv",
    [
        ["--sms", "7"],
        ["--sms", "0"],
        ["--sms", "8;16"],
        ["--sms", ""],
        ["--ranks", "0"],
        ["--tokens", "-1"],
        ["--keep", "-1"],
        ["--topk", "9", "--experts", "8"],
        ["--ranks", "9", "--experts", "8"],
    ],
)
def test_bad_arguments_are_refused(argv, capsys):
    with pytest.raises(SystemExit) as stopped:
        bench_intranode.parse_args(argv)
    assert stopped.value.code == 2
    assert "expected" in capsys.readouterr().err


# Arithmetic


def test_summary_orders_median_and_quartiles():
    assert world.summary([5.0, 1.0, 3.0, 2.0, 4.0]) == {
        "median_us": 3.0,
        "min_us": 1.0,
        "p25_us": 2.0,
        "p75_us": 4.0,
    }
    assert set(world.summary([7.0]).values()) == {7.0}


def test_ratio_is_time_over_the_limit_of_the_same_bytes():
    result = intranode_result(median_us=81.0)
    check_schema(result)
    assert [row["ratio_to_limit"] for row in result["rows"]] == [1.5, 2.0, 2.0]
    assert all(row["limit_us"] is None for row in intranode_result()["rows"])


def test_ratio_is_time_over_the_probe_of_the_same_rows_at_the_same_sms(capsys):
    found = [probe_figure(), probe_figure("pull_bf16", 8, 81.0), probe_figure("place_fp8_scales", 24)]
    result = intranode_result(probe_figures=found)
    check_schema(result)
    # 16 SMs were not probed.
    assert [row["ratio_to_probe"] for row in result["rows"]] == [None, 1.5, 2.0]
    print_result(result)
    assert "8w 1+1+1 stages of 7168" in capsys.readouterr().out


def test_every_probe_that_rows_name_exists():
    assert set(workload.PROBE_OF.values()) <= {probe.key for probe in probes.probes_of(14336, 224)}


def test_reference_check_sees_one_bit():
    rows = torch.randn(4, 8).bfloat16()
    intranode_case.same_bits("rows", rows.clone(), rows)
    wrong = rows.clone()
    wrong.view(torch.int16)[2, 3] ^= 1
    with pytest.raises(SystemExit, match="1 of 4 rows"):
        intranode_case.same_bits("rows", wrong, rows)
    with pytest.raises(SystemExit, match="expected"):
        intranode_case.same_bits("rows", rows[:3], rows)


# The whole program, on the portable engine


def test_program_checks_itself_and_writes_json(tmp_path):
    out = tmp_path / "out.json"
    shape = ["--ranks", "2", "--tokens", "24", "--hidden", "256", "--topk", "3", "--experts", "7"]
    timing = ["--sms", "8,16", "--iterations", "1", "--rounds", "2", "--keep", "2"]
    command = [sys.executable, str(ROOT / "benchmarks" / "bench_intranode.py"), *shape, *timing, "--json", str(out)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, env=env, check=False)
    assert done.returncode == 0, done.stderr
    assert "portable engine" in done.stdout
    assert "not meaningful" in done.stdout
    result = json.loads(out.read_text())
    check_schema(result)
    assert result["engine"] == "portable"
    assert not result["timings_meaningful"]
    assert [row["key"] for row in result["rows"]] == ROW_KEYS
    assert str(tmp_path) not in out.read_text()


@pytest.mark.gpu
@pytest.mark.parametrize("ranks", [2, 4])
def test_program_runs_the_kernels(tmp_path, ranks):
    """With a GPU for every rank the limits are there too; else the ranks share, and the JSON says so."""
    out = tmp_path / "out.json"
    shape = ["--ranks", str(ranks), "--tokens", "96", "--hidden", "1024", "--topk", "3", "--experts", "9"]
    timing = ["--sms", "4", "--iterations", "2", "--rounds", "2", "--keep", "2", "--pool-bytes", str(256 << 20)]
    command = [sys.executable, str(ROOT / "benchmarks" / "bench_intranode.py"), *shape, *timing, "--json", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    check_schema(result)
    assert result["engine"] == "cuda"
    assert [row["key"] for row in result["rows"]] == ROW_KEYS
    assert result["layout"]["median_us"] > 0
    assert {"layout", "fp8_dispatch_cached", "combine_symmetric"} <= {figure["key"] for figure in result["host"]}
    assert result["shared"] == (ranks > torch.cuda.device_count()) != result["timings_meaningful"]
    if not result["shared"]:
        assert all(row["ratio_to_probe"] > 0 for row in result["rows"])
        assert set(result["limits"]["flags"]) == {str(size) for size in probes.FLAG_PAYLOADS}


# Ranks that share a GPU


def test_mps_is_left_out_where_it_cannot_help(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    for ranks_per_gpu, reason in ((1, "of its own"), (4, "not installed")):
        with mps.shared_gpus(ranks_per_gpu) as why:
            assert reason in why
            assert "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE" not in os.environ


@pytest.mark.parametrize("status", [0, 1])
def test_mps_daemon_lives_as_long_as_the_ranks(monkeypatch, tmp_path, status):
    log = tmp_path / "log.txt"
    program = tmp_path / mps.CONTROL
    program.write_text(
        f'#!/bin/sh\n[ "$1" = -d ] && echo "start $CUDA_MPS_PIPE_DIRECTORY" >>{log} && exit {status}\n'
        f'read line; echo "$line $CUDA_MPS_PIPE_DIRECTORY" >>{log}\n'
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("CUDA_MPS_PIPE_DIRECTORY", "before")
    with mps.shared_gpus(3) as why:
        folder = os.environ["CUDA_MPS_PIPE_DIRECTORY"]
        if status:
            assert "ended with 1" in why
            assert folder == "before"
        else:
            assert why == ""
            assert os.environ["CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"] == "33"
            assert Path(folder).is_dir()
    assert os.environ["CUDA_MPS_PIPE_DIRECTORY"] == "before"
    assert "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE" not in os.environ
    lines = log.read_text().splitlines()
    assert len(lines) == 2 - status
    if not status:
        assert lines == [f"start {folder}", f"quit {folder}"]
        assert not Path(folder).exists()


# The README's tables


def write_results(folder: Path, *results: dict) -> Path:
    folder.mkdir(exist_ok=True)
    for i, result in enumerate(results):
        (folder / f"run_{i}.json").write_text(json.dumps(result))
    return folder


def portable_result():
    return json.loads((ROOT / "benchmarks" / "results" / "portable_4ranks_2cores.json").read_text())


def test_table_has_figures_ratios_and_targets(tmp_path):
    text = readme_tables.build(write_results(tmp_path / "results", intranode_result(median_us=81.0)))
    assert "same rows" not in text
    assert "| fp8 dispatch cached | 8 | 162 (161-163) | 185 | 81 | 2.00 | 186 |" in text
    assert "| fp8 dispatch cached | 16 | 122 (120-122) | 247 | 81 | 1.50 | 120 |" in text
    assert "| combine weights | 8 | 162 (161-163) | 185 | 81 | 2.00 | - |" in text
    assert text.index("| 8 | 162") < text.index("| 16 | 122")
    assert "2 x NVIDIA H200" in text
    assert (
        "2030-01-02, commit 0123456789ab, torch 2.12, CUDA 13.0, driver 580.1; `benchmarks/results/run_0.json`" in text
    )


def test_table_has_ratios_to_the_probes(tmp_path):
    result = intranode_result(probe_figures=[probe_figure(), probe_figure("store_16b")], median_us=81.0)
    result["layout"] = {"tokens": 4096, "topk": 8, "median_us": 3.94}
    result["limits"]["flags"] = {"0": {"median_us": 0.61}}
    result["host"] = [{"key": "layout", "name": "get_dispatch_layout", "tokens": 512, "median_us": 9.6}]
    text = readme_tables.build(write_results(tmp_path / "results", result))
    assert "| fp8 dispatch cached | 8 | 162 (161-163) | 185 | 108 | 1.50 | 81 | 2.00 | 186 |" in text
    assert "| fp8 dispatch cached | 16 | 122 (120-122) | 247 | - | - | 81 | 1.50 | 120 |" in text
    assert "| place_fp8_scales | 8 | 108 | 278 | 8w 1+1+1 stages of 7168 |" in text
    assert "store_16b" not in text  # no row is held against it
    assert "below 1" not in text
    result["rows"][0]["ratio_to_probe"] = 0.93
    assert "ratios below 1" in readme_tables.build(write_results(tmp_path / "results", result))
    assert "Layout of 4096 x 8 alone: 3.9 us." in text
    assert "A flag to the peer: 0.6 us." in text
    assert "Host time of a call (512 tokens, nothing waited for): get_dispatch_layout 10 us." in text


def low_latency_result(device="NVIDIA H200", shared=False):
    row = {"p99_us": 9.0, "floor_us": 1.6, "format": "fp8"}
    result = intranode_result(device)
    result |= {
        "benchmark": "bench_low_latency",
        "shared": shared,
        "mps": "on",
        "arguments": {**result["arguments"], "tokens": [8, 128]},
        "rows": [
            {"key": "dispatch", "name": "dispatch", "tokens": 8, "median_us": 7.4, **row},
            {"key": "dispatch", "name": "dispatch", "tokens": 128, "median_us": 11.6, **row},
            {"key": "pair_hook", "name": "pair, hooks", "tokens": 8, "median_us": 20.0, **row},
        ],
        "host": [{"name": "dispatch", "format": "fp8", "median_us": 13.2}],
        "memory": {"low_latency_bytes": 81_000_000},
        "floors": {"flags": {"0": {"median_us": 1.47}}},
    }
    return result


def test_low_latency_table(tmp_path):
    text = readme_tables.build(write_results(tmp_path / "results", low_latency_result()))
    assert "| FP8 rows, tokens a rank | 8 | 128 |" in text
    assert "| dispatch | 7.4 (7), p99 9.0, 1.6 | 11.6 (12), p99 9.0, 1.6 |" in text
    assert "| pair, hooks | 20.0, p99 9.0, 1.6 | - |" in text
    assert "Host time, FP8, us (target of a call: 12): dispatch 13.2. Symmetric memory" in text
    assert "of all these cases together: 81 MB a rank." in text
    elsewhere = readme_tables.build(write_results(tmp_path / "other", low_latency_result("NVIDIA H100")))
    assert "| dispatch | 7.4, p99 9.0, 1.6 |" in elsewhere and "target" not in elsewhere
    shared = readme_tables.build(write_results(tmp_path / "shared", low_latency_result(shared=True)))
    assert "8, 128 tokens a rank" in shared and "a check that every result is right" in shared


def test_targets_only_where_they_were_set(tmp_path):
    for i, result in enumerate((intranode_result("NVIDIA H100"), intranode_result(ranks=4))):
        text = readme_tables.build(write_results(tmp_path / str(i), result))
        assert "target" not in text
        assert "| fp8 dispatch cached | 8 | 162 (161-163) | 185 | - | - |" in text


def test_runs_that_say_nothing_about_links_are_marked(tmp_path):
    result = intranode_result()
    result["timings_meaningful"] = False
    assert "Not a measurement" in readme_tables.build(write_results(tmp_path / "results", result))


@pytest.mark.parametrize(("reason", "said"), [("on", "under MPS"), ("not installed", "in time slices")])
def test_ranks_that_share_gpus_are_a_check_and_no_table(tmp_path, reason, said):
    result = intranode_result(ranks=8, probe_figures=[probe_figure()], median_us=81.0)
    result.update(timings_meaningful=False, shared=True, mps=reason)
    text = readme_tables.build(write_results(tmp_path / "results", result))
    assert f"**8 ranks on 2 x NVIDIA H200** {said}" in text
    assert "every result is right bit for bit, no measurement" in text
    assert "`benchmarks/results/run_0.json`" in text
    assert "|" not in text
    assert " us" not in text


def test_kernels_come_before_the_portable_engine(tmp_path):
    folder = write_results(tmp_path / "results", portable_result(), intranode_result())
    text = readme_tables.build(folder)
    assert text.index("NVIDIA H200") < text.index("Portable engine")
    assert text == readme_tables.build(folder)


def test_check_and_rewrite(tmp_path, capsys):
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n\n{readme_tables.BEGIN}\nold\n{readme_tables.END}\n\nafter\n")
    flags = ["--readme", str(readme), "--results", str(write_results(tmp_path / "results", portable_result()))]
    assert readme_tables.main([*flags, "--check"]) == 1
    assert "out of date" in capsys.readouterr().err
    assert "old" in readme.read_text()
    assert readme_tables.main(flags) == 0
    assert readme_tables.main([*flags, "--check"]) == 0
    text = readme.read_text()
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "old" not in text
    changed = copy.deepcopy(portable_result())
    changed["rows"][0]["ratio_of_medians"] += 1
    write_results(tmp_path / "results", changed)
    assert readme_tables.main([*flags, "--check"]) == 1


def test_no_results_leave_the_marks_alone(tmp_path):
    readme = tmp_path / "README.md"
    text = f"{readme_tables.BEGIN}\n{readme_tables.END}\n"
    readme.write_text(text)
    assert readme_tables.main(["--readme", str(readme), "--results", str(write_results(tmp_path / "none"))]) == 0
    assert readme.read_text() == text


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"benchmark": "other"}', '{"benchmark": "bench_intranode"}'])
def test_a_file_that_is_no_result_is_named(tmp_path, capsys, content):
    readme = tmp_path / "README.md"
    readme.write_text(f"{readme_tables.BEGIN}\n{readme_tables.END}\n")
    (tmp_path / "odd.json").write_text(content)
    assert readme_tables.main(["--readme", str(readme), "--results", str(tmp_path)]) == 2
    assert "odd.json" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["nothing", f"{readme_tables.END}\n{readme_tables.BEGIN}", readme_tables.BEGIN * 2])
def test_a_readme_without_marks_is_refused(tmp_path, capsys, text):
    readme = tmp_path / "README.md"
    readme.write_text(text)
    assert readme_tables.main(["--readme", str(readme), "--results", str(tmp_path)]) == 2
    assert "must have one line" in capsys.readouterr().err
    assert readme.read_text() == text


def test_readme_is_up_to_date_with_the_results():
    command = [sys.executable, str(ROOT / "benchmarks" / "readme_tables.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def test_committed_intranode_results_follow_the_schema():
    for path in sorted((ROOT / "benchmarks" / "results").glob("*.json")):
        result = json.loads(path.read_text())
        if result["benchmark"] == "bench_intranode":
            check_schema(result)
