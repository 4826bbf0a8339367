"""Runs cases on the GPU that is here: `on_gpu.py [CASE...]`, by default all of them. It needs nvcc."""

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import cases
import harness
from cases_large import WITHOUT_RACE_CHECK

NAMES = [name for name in cases.CASES if name not in WITHOUT_RACE_CHECK]  # whose arrays are too large to be copied


def main() -> None:
    jobs = [{"case": name, "order": "forward", "planted": -1, "few": False} for name in sys.argv[1:] or NAMES]
    with tempfile.TemporaryDirectory() as folder:
        # Nothing here may wake CUDA up, for the processes of the cases are forks of this one.
        outcomes = cases.run_all(str(harness.build_for_gpu(Path(folder), "native")), jobs)
    for outcome in sorted(outcomes, key=lambda outcome: outcome["error"] is not None):  # what failed at the end
        print(f"{outcome['case']}: {outcome['error'] or 'right'}, after {outcome['seconds']:.1f} s")
    sys.exit(any(outcome["error"] for outcome in outcomes))


if __name__ == "__main__":
    main()
