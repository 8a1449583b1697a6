"""python -m flash_dmattn info | check | bench, as a user's shell runs them."""

import os
import re
import subprocess
import sys

import flash_dmattn
import pytest


def run(*arguments, expected=0, **environment):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"} | environment
    result = subprocess.run(
        [sys.executable, "-m", "flash_dmattn", *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == expected, result.stdout + result.stderr
    return result.stdout + result.stderr


def test_info():
    text = run("info")
    assert f"flash_dmattn {flash_dmattn.__version__}" in text and "PyTorch" in text
    assert re.search(r"native library: .*cpu \(", text)
    for backend in flash_dmattn.get_available_backends():
        assert re.search(rf"^\s*{backend}: ", text, re.MULTILINE)
    assert re.search(r"cpu: runs", text)


def test_check():
    text = run("check")
    assert "everything agrees" in text and "FAILED" not in text
    for word in ("selection", "attention", "cpu", "reference", "float64", "bfloat16", "dbias"):
        assert word in text, text


def test_bench():
    text = run(
        "bench", "--shape", "1", "256", "4", "2", "32", "--window", "64", "--repeats", "2", "--backward"
    )
    assert re.search(r"window 64\s+[\d.]+ ms", text) and re.search(r"[\d.]+ times as fast", text)


@pytest.mark.parametrize(
    "arguments, words",
    [
        ((), "required"),
        (("fly",), "invalid choice: 'fly'"),
        (("bench", "--shape", "1", "2"), "--shape"),
        (("bench", "--dtype", "int8"), "int8"),
    ],
)
def test_wrong_arguments(arguments, words):
    assert words in run(*arguments, expected=2)
