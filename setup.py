"""Builds secondorder._C from the sources in csrc/.

SECONDORDER_CUDA=0|1|auto (default auto: with CUDA where both torch and the machine have it; building needs no GPU).
CUDA_HOME, TORCH_CUDA_ARCH_LIST and MAX_JOBS mean what they mean to torch.
"""

import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import setup

try:
    import torch
except ImportError:
    # Build isolation hides the environment's packages. The extension must be compiled against the very torch it will run
    # with, so that one is taken, never a second one installed for the build.
    sys.path.append(sysconfig.get_path("purelib"))
    try:
        import torch
    except ImportError:
        sys.exit(
            "secondorder: building needs the torch it will run with, and none is installed in "
            f"{sys.prefix}. Install it first (for example: pip install torch), then repeat the command; "
            "in a tool that builds elsewhere (uv, build), use --no-build-isolation."
        )

CUDA_ARCHITECTURES = "8.0;8.6;8.9;9.0;10.0;12.0+PTX"


def toolkit() -> str | None:
    """Asks nvcc for the toolkit's folder, which is not the one above it where the nvcc on PATH is a link or a script."""
    try:
        report = subprocess.run(["nvcc", "--dryrun", "x.cu"], capture_output=True, text=True).stderr
    except OSError:
        return None
    top = re.search(r"^#\$ TOP=(.+)$", report, re.MULTILINE)
    return str(Path(top[1].strip()).resolve()) if top else None


# torch looks for the toolkit when this module of it is imported.
if "CUDA_HOME" not in os.environ and "CUDA_PATH" not in os.environ and (found := toolkit()):
    os.environ["CUDA_HOME"] = found
from torch.utils import cpp_extension  # noqa: E402


def cuda_wanted() -> bool:
    """Reads SECONDORDER_CUDA; `auto` asks whether torch was built with CUDA and a toolkit is there."""
    choice = os.environ.get("SECONDORDER_CUDA", "auto")
    if choice not in ("0", "1", "auto"):
        sys.exit(f"secondorder: expected SECONDORDER_CUDA to be 0, 1 or auto, got {choice!r}")
    available = torch.version.cuda is not None and cpp_extension.CUDA_HOME is not None
    if choice == "1" and not available:
        sys.exit(
            "secondorder: SECONDORDER_CUDA=1 needs a CUDA build of torch (torch.version.cuda is "
            f"{torch.version.cuda}) and a CUDA toolkit (CUDA_HOME is {cpp_extension.CUDA_HOME})"
        )
    return choice != "0" and available


def sources(cuda: bool) -> list[str]:
    """Lists csrc's source files, relative to this file as setuptools wants them."""
    root = Path(__file__).parent
    found = (path.relative_to(root) for suffix in ("cpp", "cu") for path in root.glob(f"csrc/**/*.{suffix}"))
    return sorted(str(path) for path in found if cuda or "cuda" not in path.parts)


cuda = cuda_wanted()
if cuda:
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", CUDA_ARCHITECTURES)
# Nobody reads errno or the exception flags of floating-point numbers; without them roots and choices are vectors, too.
flags = ["-std=c++20", "-O3", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-fvisibility=hidden", "-Wall"]
if cuda:
    flags.append(f'-DSECONDORDER_CUDA_ARCHITECTURES="{os.environ["TORCH_CUDA_ARCH_LIST"]}"')
extension = (cpp_extension.CUDAExtension if cuda else cpp_extension.CppExtension)(
    "secondorder._C",
    sources(cuda),
    extra_compile_args={"cxx": flags, "nvcc": ["-std=c++20", "-O3", "--Werror", "all-warnings"]},
)

setup(ext_modules=[extension], cmdclass={"build_ext": cpp_extension.BuildExtension})
