"""Every kernel on awkward sizes against float64 oracles. As a script, `cases.py LIBRARY` runs the jobs that it reads as JSON,
each in a process of its own (AddressSanitizer must be loaded before Python)."""

import gc
import json
import os
import sys
import tempfile
import time
from pathlib import Path

import case_tools
import cases_bfgs  # noqa: F401  importing a family registers its cases
import cases_bias_hessian  # noqa: F401
import cases_eacg  # noqa: F401
import cases_eigen
import cases_large  # noqa: F401
import numpy as np
import torch
from case_tools import CASES
from harness import Kernels


def run(library: Kernels, job: dict) -> dict:
    """What became of {"case", "order", "planted": the bug or -1, "few"}: {"error", "races"}."""
    if job["few"]:
        case_tools.few()
        cases_eigen.few()
    library.configure(job["order"], seed=1, planted=job["planted"])
    error = None
    try:
        with np.errstate(all="ignore" if job["planted"] >= 0 else "warn"):
            CASES[job["case"]](library)
    except (AssertionError, RuntimeError) as problem:
        error = f"{type(problem).__name__}: {problem}"
    return {"error": error, "races": library.races()}


def run_all(path: str, jobs: list[dict]) -> list[dict]:
    """The outcomes of all jobs, each in a process of its own, which a bug may end; as many at once as there are cores."""
    library, outcomes, running = Kernels(Path(path)), [], {}
    torch.set_num_threads(1)
    gc.freeze()
    for job in [*jobs, *([None] * os.cpu_count())]:
        if len(running) == os.cpu_count() or (job is None and running):
            process, status = os.wait()
            number, said, start = running.pop(process)
            said.seek(0)
            text = said.read().decode(errors="replace")
            outcome = json.loads(text.rsplit("\n", 1)[1]) if status == 0 else {"error": text or f"status {status}", "races": []}
            outcomes.append({**jobs[number], **outcome, "seconds": time.monotonic() - start})
        if job is None:
            continue
        said = tempfile.TemporaryFile()  # noqa: SIM115
        process = os.fork()
        if process == 0:
            os.dup2(said.fileno(), 1)
            os.dup2(said.fileno(), 2)
            outcome = run(library, job)
            os.write(1, b"\n" + json.dumps(outcome).encode())
            os._exit(0)
        running[process] = (jobs.index(job), said, time.monotonic())
    return outcomes


if __name__ == "__main__":
    print(json.dumps(run_all(sys.argv[1], json.load(sys.stdin))))
