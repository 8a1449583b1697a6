"""How fast the forward is, beside what else PyTorch has for it; README.md explains the columns.

    python benchmarks/forward_performance.py --out benchmarks/results/forward.json
    python benchmarks/forward_performance.py --warmup 2 --runs 3 --test-type length

A front of run.py, whose options it takes (--runs, --warmup, --seed, --test-type, --budget-seconds, --out).
"""

import sys

import run

if __name__ == "__main__":
    sys.exit(run.main(["--suite", "forward", "--seconds", "1.5", *sys.argv[1:]]))
