"""Tables of tuned SM budgets: which entry serves, where files are looked for, and what becomes of broken ones."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from deep_ep import Buffer, tuning
from deep_ep.config import DEFAULT_NUM_SMS
from deep_ep.errors import ConfigError
from deep_ep.tuning import Gpu, tuned_num_sms

H200, H100, B200 = Gpu("NVIDIA H200", "9.0"), Gpu("NVIDIA H100 80GB HBM3", "9.0"), Gpu("NVIDIA B200", "10.0")


def entry(
    dispatch: int = 8, combine: int = 10, gpu: Gpu = H200, ranks: int = 2, hidden: int = 7168, dtype: str = "bf16",
    ranks_per_gpu: int = 1, engine: str = "cuda",
) -> dict[str, Any]:  # fmt: skip
    return {
        "gpu": gpu.name, "capability": gpu.capability, "ranks": ranks, "ranks_per_gpu": ranks_per_gpu,
        "shared": ranks_per_gpu > 1, "hidden": hidden, "dtype": dtype, "engine": engine,
        "dispatch": {"num_sms": dispatch}, "combine": {"num_sms": combine},
    }  # fmt: skip


@pytest.fixture(autouse=True)
def places(tmp_path, monkeypatch):
    """Empty places to look in: a cache folder and a folder of shipped tables."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("DEEP_EP_TUNING", raising=False)
    monkeypatch.setattr(tuning, "_SHIPPED", tmp_path / "shipped")
    tuning.forget()
    yield tmp_path
    tuning.forget()


@pytest.fixture
def nobody_chose(monkeypatch):
    monkeypatch.setattr(Buffer, "num_sms", DEFAULT_NUM_SMS)
    monkeypatch.setattr(Buffer, "_num_sms_was_set", False)


def write(path: Path, *entries: dict[str, Any]) -> Path:
    tuning.write_entries(path, entries)
    return path


def user_table(*entries: dict[str, Any]) -> Path:
    return write(tuning.user_folder() / tuning.TABLE_NAME, *entries)


# ----------------------------------------------------------------------------------------------------
# Which entry


def test_without_tables_there_is_no_budget():
    assert tuned_num_sms("dispatch", H200, 2, 7168, "bf16") is None
    assert Buffer.get_dispatch_config(2).num_sms == Buffer.num_sms


RULES = [
    (entry(4, ranks=2), entry(6, ranks=8), {"num_ranks": 2}, 4),
    (entry(4, ranks=2), entry(6, ranks=8), {"num_ranks": 64}, 6),
    (entry(4, ranks=2), entry(6, ranks=8), {"num_ranks": 1}, 4),
    (entry(4, ranks=2), entry(6, ranks=8), {"num_ranks": 4}, 6),  # the same ratio to both: the larger group
    (entry(4, hidden=7168), entry(6, hidden=2048), {"hidden": 7168}, 4),
    (entry(4, hidden=7168), entry(6, hidden=2048), {"hidden": 2560}, 6),
    (entry(4, dtype="fp8"), entry(6, dtype="bf16"), {"dtype": "fp8"}, 4),
    (entry(4, dtype="fp8"), entry(6, dtype="bf16"), {"dtype": "bf16"}, 6),
    (entry(4, dtype="bf16", hidden=2048), entry(6, dtype="bf16"), {"dtype": "fp8", "hidden": 2048}, 4),
    # The dtype counts before the hidden size, the number of ranks before both.
    (entry(4, dtype="fp8", hidden=2048), entry(6, dtype="bf16"), {"dtype": "fp8"}, 4),
    (entry(4, dtype="fp8", ranks=4), entry(6, dtype="bf16"), {"dtype": "fp8"}, 6),
    # Not known: enough for all.
    (entry(8, dtype="fp8"), entry(6, dtype="bf16"), {"dtype": None, "hidden": None}, 8),
    (entry(8, hidden=2048), entry(6), {"hidden": None}, 8),
    (entry(8, dtype="fp8", ranks=4), entry(6), {"dtype": None, "hidden": None}, 6),
    # The GPU: its name, else its compute capability.
    (entry(4, gpu=H200), entry(6, gpu=H100), {"gpu": H100}, 6),
    (entry(4, gpu=H200, ranks=8), entry(6, gpu=B200), {"gpu": H100}, 4),
    (entry(4, gpu=H200), entry(6, gpu=H100), {"gpu": B200}, None),
    (entry(4), entry(6), {"gpu": None}, None),
    (entry(4), entry(6), {"num_ranks": 0}, None),
    # Shared GPUs and other engines.
    (entry(4, ranks_per_gpu=2), entry(6, ranks=8), {}, 6),
    (entry(4, ranks_per_gpu=2), entry(6), {"ranks_per_gpu": 2}, 4),
    (entry(4, ranks_per_gpu=2), entry(6), {"ranks_per_gpu": 4}, None),
    (entry(4, engine="portable"), entry(6, engine="portable", ranks=4), {}, None),
]  # fmt: skip


@pytest.mark.parametrize(("first", "second", "asked", "want"), RULES)
def test_the_nearest_entry_serves(first, second, asked, want):
    user_table(first, second)
    given = {"gpu": H200, "num_ranks": 2, "hidden": 7168, "dtype": "bf16", **asked}
    assert tuned_num_sms("dispatch", **given) == want


def test_operations_have_budgets_of_their_own():
    user_table(entry(4, 12))
    assert tuned_num_sms("dispatch", H200, 2) == 4
    assert tuned_num_sms("combine", H200, 2) == 12


# ----------------------------------------------------------------------------------------------------
# Where


def test_search_path(places, monkeypatch):
    write(places / "shipped" / "machine.json", entry(2), entry(14, gpu=B200))
    assert tuned_num_sms("dispatch", H200, 2) == 2
    user_table(entry(4, ranks=8))
    assert tuned_num_sms("dispatch", H200, 2) == 4, "the user's own table comes first, whatever its other numbers"
    assert tuned_num_sms("dispatch", B200, 2) == 14, "a GPU that it does not know is looked up further on"
    monkeypatch.setenv("DEEP_EP_TUNING", str(write(places / "named.json", entry(6))))
    tuning.forget()
    assert tuned_num_sms("dispatch", H200, 2) == 6
    argument = str(write(places / "argument.json", entry(8)))
    assert tuned_num_sms("dispatch", H200, 2, table=argument) == 8
    assert tuned_num_sms("dispatch", B200, 2, table=argument) == 14
    monkeypatch.setenv("DEEP_EP_TUNING", "off")
    tuning.forget()
    assert tuned_num_sms("dispatch", H200, 2) is None
    assert tuned_num_sms("dispatch", H200, 2, table=argument) == 8


def test_a_name_elsewhere_is_nearer_than_a_relative_here(places):
    write(places / "shipped" / "machine.json", entry(2, gpu=H100))
    user_table(entry(4, gpu=H200))
    assert tuned_num_sms("dispatch", H100, 2) == 2


@pytest.mark.parametrize("base", ["", "relative/cache"])
def test_cache_folder_without_a_usable_variable(base, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", base)
    monkeypatch.setenv("HOME", "/home/someone")
    assert tuning.user_folder() == Path("/home/someone/.cache/deep_ep")


# ----------------------------------------------------------------------------------------------------
# Broken files

NO_FIELD = entry()
del NO_FIELD["combine"]
BROKEN = {
    "no JSON": "{",
    "not text": b"\xff\xfe\x00",
    "a list": "[]",
    "another file": '{"steps": 3}',
    "another format": '{"format": 2, "entries": {}}',
    "entries that are a list": '{"format": 1, "entries": []}',
    "no field": json.dumps({"format": 1, "entries": {"a": NO_FIELD}}),
    "no object": json.dumps({"format": 1, "entries": {"a": 3}}),
    "an odd budget": json.dumps({"format": 1, "entries": {"a": entry(7)}}),
    "a budget of 0": json.dumps({"format": 1, "entries": {"a": entry(0)}}),
    "a text for a number": json.dumps({"format": 1, "entries": {"a": {**entry(), "ranks": "2"}}}),
    "true for a number": json.dumps({"format": 1, "entries": {"a": {**entry(), "ranks": True}}}),
    "a list for a name": json.dumps({"format": 1, "entries": {"a": {**entry(), "gpu": ["H200"]}}}),
    "an unknown dtype": json.dumps({"format": 1, "entries": {"a": {**entry(), "dtype": "fp4"}}}),
}


def put(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN)
@pytest.mark.parametrize("where", ["user", "variable"])
def test_a_broken_table_costs_one_warning(content, where, places, monkeypatch, caplog):
    write(places / "shipped" / "machine.json", entry(2))
    path = put(places / "cache" / "deep_ep" / "tuned.json" if where == "user" else places / "mine.json", content)
    if where == "variable":
        monkeypatch.setenv("DEEP_EP_TUNING", str(path))
    tuning.forget()
    with caplog.at_level(logging.WARNING, logger="deep_ep"):
        for num_ranks in (1, 2, 3):
            assert tuned_num_sms("dispatch", H200, num_ranks) == 2
            Buffer.get_combine_config(num_ranks)
    assert [str(path) in record.getMessage() for record in caplog.records] == [True]


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN)
def test_a_broken_table_that_was_passed_is_an_error(content, places, nobody_chose):
    path = put(places / "mine.json", content)
    for get in (Buffer.get_dispatch_config, Buffer.get_combine_config):
        with pytest.raises(ConfigError, match=r"mine\.json"):
            get(2, table=path)
    with pytest.raises(ConfigError, match=r"mine\.json"):
        tuning.write_entries(path, [entry()])
    assert path.read_bytes() == (content if isinstance(content, bytes) else content.encode()), "nobody's file is lost"


def test_a_missing_file(places, monkeypatch, caplog, nobody_chose):
    with pytest.raises(ConfigError, match=r"absent\.json"):
        Buffer.get_dispatch_config(2, table=places / "absent.json")
    monkeypatch.setenv("DEEP_EP_TUNING", str(places / "gone.json"))
    tuning.forget()
    with caplog.at_level(logging.WARNING, logger="deep_ep"):
        assert tuned_num_sms("dispatch", H200, 2) is None
        assert tuned_num_sms("combine", H200, 2) is None
    assert ["gone.json" in record.getMessage() for record in caplog.records] == [True]


# ----------------------------------------------------------------------------------------------------
# Writing


def test_writing_replaces_its_own_key_only(places):
    path = write(places / "t.json", entry(2), entry(4, dtype="fp8"), entry(6, ranks=8), entry(8, ranks_per_gpu=2))
    write(path, entry(10, dtype="fp8"))
    budgets = {item.key: item.dispatch for item in tuning.read_entries(path)}
    assert budgets == {
        "NVIDIA H200 | 2 ranks | hidden 7168 | bf16": 2,
        "NVIDIA H200 | 2 ranks | hidden 7168 | fp8": 10,
        "NVIDIA H200 | 8 ranks | hidden 7168 | bf16": 6,
        "NVIDIA H200 | 2 ranks | hidden 7168 | bf16 | 2 ranks a GPU": 8,
    }
    assert os.listdir(places) == ["t.json"], "no temporary file is left"


def test_a_failed_write_leaves_the_old_table(places, monkeypatch):
    path = write(places / "t.json", entry(2))

    def fails(source, target):
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(OSError, match="no space"):
        write(path, entry(4))
    assert [item.dispatch for item in tuning.read_entries(path)] == [2]
    assert os.listdir(places) == ["t.json"]


def test_what_is_written_is_used_at_once():
    user_table(entry(2))
    assert tuned_num_sms("dispatch", H200, 2) == 2
    user_table(entry(4))
    assert tuned_num_sms("dispatch", H200, 2) == 4


# ----------------------------------------------------------------------------------------------------
# Configurations


@pytest.fixture
def on_an_h200(monkeypatch):
    """The current GPU, and the device "meta", look like an H200."""
    monkeypatch.setattr(tuning, "_current_gpu", lambda: H200)
    monkeypatch.setattr(tuning, "gpu_of", lambda device: H200 if device.type == "meta" else None)
    user_table(
        entry(4, 8, dtype="fp8"), entry(6, 10), entry(12, 14, ranks_per_gpu=2), entry(16, 18, hidden=512, ranks=8)
    )


def test_static_configs_use_the_table(on_an_h200, nobody_chose):
    assert Buffer.num_sms == 20
    assert (Buffer.get_dispatch_config(2).num_sms, Buffer.get_combine_config(2).num_sms) == (6, 10)
    assert Buffer.get_dispatch_config(8).num_sms == 16
    with pytest.raises(ConfigError, match="0 ranks"):
        Buffer.get_dispatch_config(0)


def test_a_budget_that_was_set_wins(on_an_h200, nobody_chose, places):
    Buffer.set_num_sms(24)
    assert Buffer.num_sms == Buffer.get_dispatch_config(2).num_sms == Buffer.get_combine_config(2).num_sms == 24
    Buffer.set_num_sms(20)
    assert Buffer.get_dispatch_config(2, table=write(places / "t.json", entry(2))).num_sms == 20


def test_a_budget_that_was_assigned_wins(on_an_h200, nobody_chose):
    Buffer.num_sms = 18
    assert Buffer.get_combine_config(2).num_sms == 18


def test_configs_of_calls_know_the_rows(on_an_h200):
    def budget(operation: str, rows: torch.Tensor, **given: Any) -> int:
        return tuning.config_for_call(operation, 2, rows, given.pop("num_sms", None), **given).num_sms

    wide = torch.empty((3, 7168), dtype=torch.bfloat16, device="meta")
    assert budget("dispatch", wide) == 6
    assert budget("combine", wide) == 10
    assert budget("dispatch", wide.to(torch.float8_e4m3fn)) == budget("dispatch", wide.to(torch.uint8)) == 4
    assert budget("dispatch", wide.float()) == 6
    assert budget("dispatch", wide, use_fp8=True) == 4
    assert budget("dispatch", wide, ranks_per_gpu=2) == 12
    assert budget("dispatch", wide, ranks_per_gpu=3) == DEFAULT_NUM_SMS
    assert budget("dispatch", wide, num_sms=2) == 2
    assert budget("dispatch", torch.empty(3, 7168)) == DEFAULT_NUM_SMS, "nothing is tuned for the CPU"
    assert tuning.config_for_call("dispatch", 2, wide, None) is tuning.config_for_call("dispatch", 2, wide, None)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_without_a_gpu_nothing_is_looked_up(nobody_chose):
    user_table(entry(4))
    assert Buffer.get_dispatch_config(2).num_sms == DEFAULT_NUM_SMS
    assert tuning.gpu_of(torch.device("cpu")) is None
    assert not torch.cuda.is_initialized()


def test_shipped_tables_are_sound():
    for path in (Path(tuning.__file__).parent / "tuned").glob("*.json"):
        assert all(item.engine == "cuda" for item in tuning.read_entries(path)), path
