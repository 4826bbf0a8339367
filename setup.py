"""Builds secondorder._C from csrc/sources.txt.

SECONDORDER_CUDA=0|1|auto (default auto: with CUDA where both torch and the machine have it; building needs no GPU).
TORCH_CUDA_ARCH_LIST and MAX_JOBS mean what they mean to torch.
"""

import os
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

from torch.utils import cpp_extension

CUDA_ARCHITECTURES = "8.0;8.6;8.9;9.0;10.0;12.0+PTX"


def cuda_wanted() -> bool:
    """Reads SECONDORDER_CUDA; `auto` asks whether torch was built with CUDA and a toolkit is there."""
    choice = os.environ.get("SECONDORDER_CUDA", "auto")
    if choice not in ("0", "1", "auto"):
        sys.exit(f"secondorder: expected SECONDORDER_CUDA to be 0, 1 or auto, got {choice!r}")
    available = torch.version.cuda is not None and cpp_extension.CUDA_HOME is not None
    has_kernels = any(path.endswith(".cu") for path in SOURCES)
    if choice == "1" and not (available and has_kernels):
        sys.exit(
            "secondorder: SECONDORDER_CUDA=1 needs a CUDA build of torch (torch.version.cuda is "
            f"{torch.version.cuda}), a CUDA toolkit (CUDA_HOME is {cpp_extension.CUDA_HOME}) and the CUDA sources "
            f"({'present' if has_kernels else 'absent from csrc/sources.txt'})"
        )
    return choice != "0" and available and has_kernels


SOURCES = Path(__file__).with_name("csrc").joinpath("sources.txt").read_text().split()
cuda = cuda_wanted()
if cuda:
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", CUDA_ARCHITECTURES)
flags = ["-std=c++20", "-O3", "-fopenmp", "-fvisibility=hidden", "-Wall"]
if cuda:
    flags.append(f'-DSECONDORDER_CUDA_ARCHITECTURES="{os.environ["TORCH_CUDA_ARCH_LIST"]}"')
extension = (cpp_extension.CUDAExtension if cuda else cpp_extension.CppExtension)(
    "secondorder._C",
    [path for path in SOURCES if cuda or not path.startswith("csrc/cuda/")],
    extra_compile_args={"cxx": flags, "nvcc": ["-std=c++20", "-O3", "--Werror", "all-warnings"]},
)

setup(ext_modules=[extension], cmdclass={"build_ext": cpp_extension.BuildExtension})
