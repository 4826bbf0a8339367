"""Builds secondorder._C from the sources in csrc/.

SECONDORDER_EXTENSION=0|1 (default 1: compile; 0: install without it, plain PyTorch stands in).
SECONDORDER_CUDA=0|1|auto (default auto: with CUDA where both torch and the machine have it; building needs no GPU).
CUDA_HOME, TORCH_CUDA_ARCH_LIST and MAX_JOBS mean what they mean to torch.
"""

import os
import re
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from setuptools import setup

# Compiled where TORCH_CUDA_ARCH_LIST says nothing, each with the first nvcc that knows it. CMakeLists.txt reads this line.
CUDA_ARCHITECTURES = {"8.0": (12, 1), "8.6": (12, 1), "8.9": (12, 1), "9.0": (12, 1), "10.0": (12, 8), "12.0": (12, 8)}
OLDEST_NVCC = (12, 1)  # the first that lets a kernel have parameters of more than 4 KB
WITHOUT = (
    "To install without the compiled extension, set SECONDORDER_EXTENSION=0 and repeat the command: plain PyTorch then stands in "
    "for it, with the same steps, several times as slow."
)


def chosen(variable: str, *choices: str) -> str:
    """Reads one of the choices, the first by default."""
    choice = os.environ.get(variable, choices[0])
    if choice not in choices:
        sys.exit(f"secondorder: expected {variable} to be one of {', '.join(choices)}, got {choice!r}")
    return choice


def installed_torch() -> ModuleType:
    """Imports the torch that the extension will run with.

    Build isolation hides the environment's packages. The extension must be compiled against the very torch it will run with, so
    that one is taken, never a second one installed for the build.
    """
    try:
        import torch
    except ImportError:
        sys.path.append(sysconfig.get_path("purelib"))
        try:
            import torch
        except ImportError:
            sys.exit(
                "secondorder: building needs the torch it will run with, and none is installed in "
                f"{sys.prefix}. Install it first (for example: pip install torch), then repeat the command; "
                "in a tool that builds elsewhere (uv, build), use --no-build-isolation."
            )
    return torch


def toolkit() -> str | None:
    """Asks nvcc for the toolkit's folder, which is not the one above it where the nvcc on PATH is a link or a script."""
    try:
        report = subprocess.run(["nvcc", "--dryrun", "x.cu"], capture_output=True, text=True).stderr
    except OSError:
        return None
    top = re.search(r"^#\$ TOP=(.+)$", report, re.MULTILINE)
    return str(Path(top[1].strip()).resolve()) if top else None


def cuda_wanted(torch: ModuleType, home: str | None) -> bool:
    """Reads SECONDORDER_CUDA; `auto` asks whether torch was built with CUDA and a toolkit is there."""
    choice = chosen("SECONDORDER_CUDA", "auto", "0", "1")
    available = torch.version.cuda is not None and home is not None
    if choice == "1" and not available:
        sys.exit(
            "secondorder: SECONDORDER_CUDA=1 needs a CUDA build of torch (torch.version.cuda is "
            f"{torch.version.cuda}) and a CUDA toolkit (CUDA_HOME is {home})"
        )
    return choice != "0" and available


def nvcc_version(home: str) -> tuple[int, ...]:
    """Asks a toolkit's nvcc which version it is."""
    report = subprocess.run([f"{home}/bin/nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    release = re.search(r"release (\d+)\.(\d+)", report)
    return tuple(map(int, release.groups())) if release else OLDEST_NVCC


def architectures(nvcc: tuple[int, ...], known: Callable[[str], bool]) -> str:
    """Lists what this nvcc compiles and torch has a name for, with PTX of the last, which later cards compile as they load it."""
    if nvcc < OLDEST_NVCC:
        sys.exit(
            f"secondorder: its CUDA kernels need nvcc 12.1 or newer, got {'.'.join(map(str, nvcc))}. SECONDORDER_CUDA=0 compiles "
            "the extension without them."
        )
    return ";".join(name for name, first in CUDA_ARCHITECTURES.items() if nvcc >= first and known(name)) + "+PTX"


def known_to(cpp_extension: ModuleType) -> Callable[[str], bool]:
    """Makes what tells whether torch's own list of architectures, which its build refuses to go beyond, has this one."""

    def known(name: str) -> bool:
        os.environ["TORCH_CUDA_ARCH_LIST"] = name
        try:
            return bool(cpp_extension._get_cuda_arch_flags())
        except ValueError:
            return False
        finally:
            del os.environ["TORCH_CUDA_ARCH_LIST"]

    return known


def sources(cuda: bool) -> list[str]:
    """Lists csrc's source files, relative to this file as setuptools wants them."""
    root = Path(__file__).parent
    found = (path.relative_to(root) for suffix in ("cpp", "cu") for path in root.glob(f"csrc/**/*.{suffix}"))
    return sorted(str(path) for path in found if cuda or "cuda" not in path.parts)


def extension() -> dict[str, Any]:
    """Makes what `setup` is told of the extension."""
    if sys.platform == "win32":
        sys.exit(f"secondorder: its extension cannot be compiled on Windows. {WITHOUT}")
    torch = installed_torch()
    # torch looks for the toolkit when this module of it is imported.
    if "CUDA_HOME" not in os.environ and "CUDA_PATH" not in os.environ and (found := toolkit()):
        os.environ["CUDA_HOME"] = found
    from torch.utils import cpp_extension

    cuda = cuda_wanted(torch, cpp_extension.CUDA_HOME)
    without = "To compile it for the CPU alone, set SECONDORDER_CUDA=0 and repeat the command. " * cuda + WITHOUT

    class Build(cpp_extension.BuildExtension):
        """Says what else there is where the compiler fails, or the toolkit is not of torch's version of CUDA."""

        def build_extensions(self) -> None:
            try:
                super().build_extensions()
            except Exception as error:
                sys.exit(f"secondorder: compiling its extension failed: {error}\n{without}")

    if cuda and "TORCH_CUDA_ARCH_LIST" not in os.environ:
        os.environ["TORCH_CUDA_ARCH_LIST"] = architectures(nvcc_version(cpp_extension.CUDA_HOME), known_to(cpp_extension))
    # Nobody reads errno or the exception flags of floating-point numbers; without them roots and choices are vectors, too.
    flags = ["-std=c++20", "-O3", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden", "-Wall"]
    if sys.platform != "darwin":  # Apple's clang has no OpenMP: there the kernels run on one thread
        flags.append("-fopenmp")
    if cuda:
        flags.append(f'-DSECONDORDER_CUDA_ARCHITECTURES="{os.environ["TORCH_CUDA_ARCH_LIST"]}"')
    compiled = (cpp_extension.CUDAExtension if cuda else cpp_extension.CppExtension)(
        "secondorder._C",
        sources(cuda),
        extra_compile_args={"cxx": flags, "nvcc": ["-std=c++20", "-O3"]},
    )
    return {"ext_modules": [compiled], "cmdclass": {"build_ext": Build}}


setup(**(extension() if chosen("SECONDORDER_EXTENSION", "1", "0") == "1" else {}))
