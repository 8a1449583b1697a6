"""The benchmark programs time and pass what is right, and refuse what is wrong; documents say what was
measured."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"

# Runs the driver with one result of our own method changed. In a process of its own: there are modules of the
# same names here and there.
DRIVER = """
import sys

folder, changed, *sys.argv[1:] = sys.argv[1:]
sys.path.insert(0, folder)
import methods, run

def change(solve):
    def solve_wrongly(problem, state):
        results = yield from solve(problem, state)
        if changed in results:
            results[changed] = results[changed] + (results[changed] / 100).to(results[changed].dtype)
        return results
    return solve_wrongly

for name in (methods.OURS, methods.STAGES):
    method = methods.METHODS[name]
    variants = {variant: change(solve) for variant, solve in method.variants.items()}
    methods.METHODS[name] = method._replace(variants=variants)
sys.exit(run.main())
"""


@pytest.mark.parametrize("changed", ["nothing", "out", "dscore", "expiry"])
def test_refuses_to_time_what_is_wrong(changed):
    arguments = ["--case", "smoke", "--runs", "3", "--threads", "1"]
    arguments += [] if changed == "nothing" else ["--no-memory"]
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, BENCHMARKS, changed, *arguments],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == (0 if changed == "nothing" else 1), done.stdout + done.stderr
    assert ("Not everything was measured: smoke" in done.stderr) == (changed != "nothing")


# The same for a program that judges, with a gradient of the bias that is 1 % too large.
JUDGED = """
import runpy, sys

folder, program, wrong, *sys.argv[1:] = sys.argv[1:]
sys.path.insert(0, folder)
import torch
import flash_dmattn

attend = flash_dmattn.flash_dmattn_func

class Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return 1.01 * gradient

def attend_wrongly(*args, attn_bias, **options):
    return attend(*args, attn_bias=Scaled.apply(attn_bias), attn_score=attn_bias.detach(), **options)

if wrong == "wrong":
    flash_dmattn.flash_dmattn_func = attend_wrongly
runpy.run_path(f"{folder}/{program}", run_name="__main__")
"""


@pytest.mark.parametrize("wrong", ["right", "wrong"])
def test_grad_equivalence_finds_a_wrong_gradient_of_the_score(wrong):
    arguments = ["--device", "cpu", "--test-type", "batch"]
    command = [sys.executable, "-c", JUDGED, BENCHMARKS, "grad_equivalence.py", wrong, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == (wrong == "wrong"), done.stdout + done.stderr
    assert ("dt_proj: the worst error" in done.stdout) == (wrong == "wrong")


@pytest.mark.parametrize("program", ["forward", "backward"])
def test_equivalence(program):
    command = [
        sys.executable,
        BENCHMARKS / f"{program}_equivalence.py",
        "--device",
        "cpu",
        "--test-type",
        "length",
    ]
    done = subprocess.run([*command, "--seed", "5"], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " right; " in done.stdout and "WRONG" not in done.stdout


def tables(*arguments):
    command = [sys.executable, BENCHMARKS / "tables.py", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_documents_say_what_the_results_say():
    done = tables("--check")
    assert done.returncode == 0, done.stdout + done.stderr + "run benchmarks/tables.py"


def test_tables_come_from_the_results(tmp_path):
    """Two cases of a made-up report, through the code that fills the documents."""
    entry = {"sizes": [1, 2, 1, 512, 512, 128], "keep_window": 64, "modes": ["length"], "backward": False}
    seconds = {"flash_dmattn": 0.002, "sdpa-mask": 0.05}
    methods = {name: {"seconds": {"forward": {"median": value}}} for name, value in seconds.items()}
    report = {
        "environment": {"cpu": "a CPU", "gpu": "a GPU", "torch": "2", "commit": "abc"},
        "options": {"runs": 3},
        "cases": [
            entry | {"methods": methods},
            entry | {"methods": {"flash_dmattn": methods["flash_dmattn"]}},
        ],
    }
    (tmp_path / "forward.json").write_text(json.dumps(report))
    code = (
        f"import sys; sys.path.insert(0, {str(BENCHMARKS)!r}); import tables, pathlib; print(tables.filled("
    )
    code += f"'x\\n<!-- table: forward -->\\nold\\n<!-- end of table -->', pathlib.Path({str(tmp_path)!r})))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert "| forward | 512 | 512 | 64 | 50.0 | 2.00 | 25x |" in done.stdout, done.stdout + done.stderr
    assert "| forward | 512 | 512 | 64 | - | 2.00 | - |" in done.stdout and "old" not in done.stdout
    assert "a GPU, PyTorch 2, commit `abc`; medians of 3 runs." in done.stdout


# Where nothing is dropped and every key has the same score, the two ways to attend compute the same; where
# something is dropped, they do not.
SAME_LOSS = """
import sys

folder, window, *sys.argv[1:] = sys.argv[1:]
sys.path.insert(0, folder)
import training_step

sys.argv += ["--device", "cpu", "--dtype", "float32", "--hidden", "32", "--heads", "4", "--heads-kv", "2"]
sys.argv += ["--layers", "1", "--window", window, "--score-spread", "0"]
options = training_step.parse_arguments()
print(*(float(training_step.make_step(name, 48, options)()) for name in ("dynamic mask", "dense")))
"""


@pytest.mark.parametrize("window", [48, 4])
def test_training_step_compares_the_same_models(window):
    command = [sys.executable, "-c", SAME_LOSS, BENCHMARKS, str(window)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    dynamic, dense = (float(word) for word in done.stdout.split())
    assert (abs(dynamic - dense) < 1e-5) == (window == 48), done.stdout


def test_training_step_measures_every_model(tmp_path):
    out = tmp_path / "steps.json"
    sizes = "--hidden 32 --heads 4 --heads-kv 2 --layers 1 --window 8 --seqlens 32 64 --runs 2 --rounds 2"
    command = [sys.executable, BENCHMARKS / "training_step.py", "--device", "cpu", "--dtype", "float32"]
    subprocess.run([*command, *sizes.split(), "--out", out], check=True, timeout=120)
    lengths = json.loads(out.read_text())["lengths"]
    assert [entry["seqlen"] for entry in lengths] == [32, 64]
    for entry in lengths:
        assert set(entry["seconds"]) == {"dynamic mask", "dense", "none"}
        assert all(len(found["samples"]) == 4 and found["median"] > 0 for found in entry["seconds"].values())
