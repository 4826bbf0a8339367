"""Builds for the GPU that is here, tests and measures on it, and writes REPORT.md and REPORT.json after every step.

`python -m bench.tools.gpu_report [--out build/gpu-report]` needs a GPU, the CUDA toolkit and a CUDA build of torch, with numpy,
ninja, pytest and hypothesis beside it. It installs nothing and needs no network.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
Report = dict[str, object]
Step = dict[str, object]
MEASUREMENTS = ("recursion", "training", "operators")
# Of the tests, what sanitizers leave out: what takes them too long; and captures, for which torch's caching allocator is needed.
UNSANITIZED = ("1024", "trains", "cublas", "replay")


def run(name: str, command: list[str], limit: float, **environment: str) -> Step:
    """One step's exit status, or that it was stopped after `limit` seconds with all it had started; the end of its output."""
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, env={**os.environ, **environment}, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            status: int | str = process.wait(limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            status = f"stopped after {limit:g} s"
        output.seek(0)
        tail = output.read()[-2000:]
    print(f"{name}: exit status {status}", flush=True)
    return {"step": name, "command": " ".join(command), "status": status, "tail": tail}


def steps(folder: Path, architecture: str) -> list[tuple[str, Callable[[], Step]]]:
    """The build for one architecture, the kernels' cases, the GPU tests, the timings, smaller tests under compute-sanitizer."""
    python, tests = sys.executable, [sys.executable, "-m", "pytest", "-q", "tests/test_gpu.py"]

    def sanitizer(tool: str) -> Step:
        if shutil.which("compute-sanitizer") is None:
            return {"step": tool, "command": "compute-sanitizer", "status": "not on PATH", "tail": ""}
        command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", *tests]
        command += ["-k", " and ".join(f"not {word}" for word in UNSANITIZED)]
        return run(tool, command, 600, PYTORCH_NO_CUDA_MEMORY_CACHING="1")

    def measurement(name: str) -> Step:
        return run(name, [python, "-m", "bench.tools.gpu_timings", name, "--out", str(folder / f"{name}.json")], 900)

    build, strict = [python, "setup.py", "build_ext", "--inplace"], {"NVCC_APPEND_FLAGS": "--Werror all-warnings"}
    return [
        ("build", lambda: run("build", build, 1800, SECONDORDER_CUDA="1", TORCH_CUDA_ARCH_LIST=architecture, **strict)),
        ("cases", lambda: run("cases", [python, "tests/cuda_on_cpu/on_gpu.py"], 300)),
        ("tests", lambda: run("tests", tests, 600)),
        *((name, lambda n=name: measurement(n)) for name in MEASUREMENTS),
        *((tool, lambda t=tool: sanitizer(t)) for tool in ("racecheck", "memcheck", "synccheck", "initcheck")),  # the slowest
    ]


def table(rows: list[dict[str, object]]) -> list[str]:
    """Markdown."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for row in rows:
        cells = [row.get(column, "") for column in columns]
        lines.append("| " + " | ".join(f"{cell:.3f}" if isinstance(cell, float) else str(cell) for cell in cells) + " |")
    return lines


def markdown(report: dict) -> str:
    """The report as a page."""
    lines = ["# secondorder on a GPU", "", "Command: `python -m bench.tools.gpu_report`", ""]
    lines += [f"- {key}: {report[key]}" for key in ("GPU", "driver", "torch", "CUDA")]
    lines += [f"- {step['step']}: exit status {step['status']} (`{step['command']}`)" for step in report["steps"]]
    for name, rows in report["rows"].items():
        lines += ["", f"## {name}", "", *table(rows)]
    return "\n".join(lines) + "\n"


def write(report: dict, folder: Path) -> None:
    """The report as far as it has come, with the rows that the measurements have written, a stopped one's among them."""
    files = {name: folder / f"{name}.json" for name in MEASUREMENTS}
    report["rows"] = {name: json.loads(path.read_text()) for name, path in files.items() if path.exists()}
    (folder / "REPORT.json").write_text(json.dumps(report, indent=1) + "\n")
    (folder / "REPORT.md").write_text(markdown(report))


def driver() -> str:
    """The driver's version, where nvidia-smi tells it."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout.split("\n")[0]
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("build/gpu-report"))
    folder = parser.parse_args().out.resolve()
    if not torch.cuda.is_available():
        sys.exit("gpu_report: no GPU is visible to torch; it can neither test nor measure")
    folder.mkdir(parents=True, exist_ok=True)
    for name in MEASUREMENTS:
        (folder / f"{name}.json").unlink(missing_ok=True)
    major, minor = torch.cuda.get_device_capability()
    done: list[Step] = []
    report: Report = {"GPU": torch.cuda.get_device_name(), "driver": driver(), "torch": torch.__version__,
                      "CUDA": torch.version.cuda, "steps": done}  # fmt: skip
    for name, step in steps(folder, f"{major}.{minor}"):
        done.append(step())
        write(report, folder)
        if name == "build" and done[-1]["status"] != 0:
            break
    print(markdown(report))
    sys.exit(any(step["status"] != 0 for step in done))


if __name__ == "__main__":
    main()
