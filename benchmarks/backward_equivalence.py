"""Whether out, lse and the gradients of query, key, value and score are right for the cases of
backward_performance.py; exit code 0 or 1.

    python benchmarks/backward_equivalence.py
    python benchmarks/backward_equivalence.py --device cpu --test-type length --seed 3
"""

import sys

import equivalence

if __name__ == "__main__":
    sys.exit(equivalence.main("backward", __doc__))
