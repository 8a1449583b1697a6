"""Registers, stack and static shared memory of every CUDA kernel in a built library.

    python scripts/kernel_resources.py [LIBRARY] [--arch sm_80] [--max-stack BYTES]

LIBRARY defaults to that of the installed package. Needs cuobjdump, of the CUDA toolkit or of
`pip install nvidia-cuda-cuobjdump`, in PATH or in the variable CUOBJDUMP. The stack of a kernel holds what
registers could not: spills, and arrays indexed at run time. With --max-stack the exit code is 1 if some
kernel has more. Dynamic shared memory, which a launch asks for, is not in a library.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple


class Kernel(NamedTuple):
    arch: str
    name: str
    registers: int
    stack: int
    local: int
    shared: int


def resource_usage(library: Path) -> str:
    tool = os.environ.get("CUOBJDUMP") or shutil.which("cuobjdump")
    if tool is None:
        sys.exit("cuobjdump is missing; `pip install nvidia-cuda-cuobjdump` has it, if no CUDA toolkit does")
    command = [tool, "--dump-resource-usage", str(library)]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        sys.exit(f"{' '.join(command)}: {result.stderr.strip()}")
    return result.stdout


def demangled(names: list[str]) -> list[str]:
    result = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True)
    return result.stdout.splitlines()


def short(signature: str) -> str:
    """A demangled signature without return type, namespaces and parameters."""
    signature = re.sub(r"\(anonymous namespace\)::", "", signature)
    depth = 0
    for index, character in enumerate(signature):  # parameters begin at the first parenthesis outside of <>
        depth += {"<": 1, ">": -1}.get(character, 0)
        if character == "(" and depth == 0:
            signature = signature[:index]
            break
    name = re.sub(r"\b(?:\w+::)+", "", signature.removeprefix("void ")).replace(" >", ">")
    return name if len(name) <= 80 else name[:77] + "..."


def parse(text: str) -> list[Kernel]:
    """Reads lines "arch = sm_80", " Function <mangled>:" and "  REG:40 STACK:0 SHARED:1024 LOCAL:0 ..."."""
    rows, arch, mangled = [], "", ""
    for line in text.splitlines():
        if match := re.match(r"arch = (\S+)", line):
            arch = match[1]
        elif match := re.match(r"\s*Function (\S+):", line):
            mangled = match[1]
        elif mangled and (numbers := dict(re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", line))):
            rows.append((arch, mangled, *(int(numbers[key]) for key in ("REG", "STACK", "LOCAL", "SHARED"))))
            mangled = ""
    names = demangled([row[1] for row in rows])
    return sorted(Kernel(row[0], short(name), *row[2:]) for row, name in zip(rows, names))


def installed_library() -> Path:
    from flash_dmattn import _library

    return _library.find() or sys.exit("flash_dmattn is installed without its native library")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("library", nargs="?", type=Path, help="default: that of the installed package")
    parser.add_argument("--arch", help="only this one, such as sm_80")
    parser.add_argument("--max-stack", type=int, metavar="BYTES", help="fail if a kernel has a larger stack")
    arguments = parser.parse_args()
    kernels = parse(resource_usage(arguments.library or installed_library()))
    kernels = [kernel for kernel in kernels if arguments.arch in (None, kernel.arch)]
    print(f"{'arch':8}{'registers':>10}{'stack':>7}{'local':>7}{'shared':>8}  kernel")
    for kernel in kernels:
        numbers = f"{kernel.registers:10}{kernel.stack:7}{kernel.local:7}{kernel.shared:8}"
        print(f"{kernel.arch:8}{numbers}  {kernel.name}")
    print(f"{len(kernels)} kernels")
    limit = arguments.max_stack
    large = [] if limit is None else [kernel for kernel in kernels if kernel.stack + kernel.local > limit]
    for kernel in large:
        print(f"{kernel.name}, {kernel.arch}: more than {limit} bytes of stack and local memory")
    return 1 if large or not kernels else 0


if __name__ == "__main__":
    sys.exit(main())
