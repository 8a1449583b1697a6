"""How fast the backward is, beside what else PyTorch has for it; README.md explains the columns.

    python benchmarks/backward_performance.py --out benchmarks/results/backward.json
    python benchmarks/backward_performance.py --warmup 2 --runs 3 --test-type length

A front of run.py, whose options it takes (--runs, --warmup, --seed, --test-type, --budget-seconds, --out).
"""

import sys

import run

if __name__ == "__main__":
    sys.exit(run.main(["--suite", "backward", "--seconds", "1.5", *sys.argv[1:]]))
