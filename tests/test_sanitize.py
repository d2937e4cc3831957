"""What sanitize.py makes of the tools' output, with a stand-in for the tools."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from harness import TESTS_DIR
from sanitize import problems

CLEAN = """========= COMPUTE-SANITIZER
rank 0 finished: all results are right
rank 1 finished: all results are right
========= ERROR SUMMARY: 0 errors
========= ERROR SUMMARY: 0 errors
"""


def test_problems():
    assert problems(CLEAN, 0, 2) == []
    assert problems(CLEAN.replace("SUMMARY: 0 errors\n", "SUMMARY: 1 error\n", 1), 9, 2) == ["1 errors", "exit code 9"]
    assert problems(CLEAN, 0, 3) == ["2 of 3 ranks finished"]
    race = CLEAN.replace("ERROR SUMMARY: 0 errors", "RACECHECK SUMMARY: 2 hazards displayed (2 errors, 0 warnings)")
    assert problems(race, 0, 2) == ["4 errors"]
    assert problems("", 1, 2) == ["no summary", "0 of 2 ranks finished", "exit code 1"]


@pytest.mark.parametrize(
    ("body", "code", "words"),
    [
        (f"printf '{CLEAN}'", 0, "memcheck: no errors"),
        ("echo '========= ERROR SUMMARY: 3 errors'; exit 9", 1, "memcheck: 3 errors; 0 of"),
        ("sleep 60", 1, "memcheck: no end within 0.5 s"),
    ],
)
def test_one_line_per_tool(tmp_path: Path, body, code, words):
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(f"#!/bin/sh\n{body}\n")
    tool.chmod(0o755)
    command = [sys.executable, str(TESTS_DIR / "sanitize.py"), "--tools", "memcheck", "--limit", "0.5"]
    env = {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    assert words in done.stdout
