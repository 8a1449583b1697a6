"""Whether selection, out and lse of the public function are right for the cases of forward_performance.py;
exit code 0 or 1.

    python benchmarks/forward_equivalence.py
    python benchmarks/forward_equivalence.py --device cpu --test-type length --seed 3
"""

import sys

import equivalence

if __name__ == "__main__":
    sys.exit(equivalence.main("forward", __doc__))
