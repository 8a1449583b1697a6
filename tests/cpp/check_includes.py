"""Who may include and import whom, as docs/architecture.md says; run by ctest.

    python check_includes.py ROOT
"""

import ast
import re
import sys
from pathlib import Path

INCLUDE = re.compile(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', re.MULTILINE)

# Folder -> prefixes of the project's own headers that its files may include, besides the standard library and
# Highway. The first folder that holds a file decides.
ALLOWED = {
    "include": ["flash_dmattn/"],
    "src/core": ["flash_dmattn/", "core/"],
    "src/cpu": ["flash_dmattn/", "core/", "cpu/"],
    "src/cuda/common": ["flash_dmattn/", "core/", "cuda/common/"],
    "src/cuda/selection": ["flash_dmattn/", "core/", "cuda/backend.h", "cuda/common/", "cuda/selection/"],
    "src/cuda/sm80": ["flash_dmattn/", "core/", "cuda/common/", "cuda/sm80/", "cuda/sm90/dense.h"],
    "src/cuda/sm90": ["flash_dmattn/", "core/", "cuda/common/", "cuda/sm80/", "cuda/sm90/"],
    # src/cuda/*.cu join what the folders of kernels offer.
    "src/cuda": ["flash_dmattn/", "core/", "cuda/"],
    "src": ["flash_dmattn/", "core/", "cpu/backend.h", "cuda/backend.h"],  # src/api.cpp joins core and backends
    "bindings": ["flash_dmattn/", "torch/", "cpu/bugs.h"],  # cpu/bugs.h: in the test build only
    "examples/aoti": ["ATen/", "c10/", "torch/"],  # runs a packaged model, without Python
    "examples": ["flash_dmattn/"],
}
HIGHWAY = ["src/cpu"]
CUDA = ["src/cuda"]
# The backend "reference", and the self-check that compares the others with it.
OPTIONAL = {"viz.py": {"matplotlib"}}  # imported when it is first used
MAY_IMPORT_REFERENCE = {"_backends.py", "_selfcheck.py"}


def own_headers(root: Path) -> set[str]:
    """Every header of the project as an include path could spell it."""
    names = set()
    for base in ("include", "src"):
        for pattern in ("*.h", "*.cuh"):
            names |= {str(path.relative_to(root / base)) for path in (root / base).rglob(pattern)}
    return names


def folder_of(path: str) -> str | None:
    return next((folder for folder in ALLOWED if path.startswith(folder + "/")), None)


def check_cpp(root: Path) -> tuple[list[str], int]:
    problems, count = [], 0
    headers = own_headers(root)
    files = [p for base in ("include", "src", "bindings", "examples") for p in sorted((root / base).rglob("*"))]
    for path in files:
        if path.suffix not in {".h", ".hpp", ".c", ".cpp", ".cu", ".cuh"}:
            continue
        relative = str(path.relative_to(root))
        folder = folder_of(relative)
        for name in INCLUDE.findall(path.read_text()):
            count += 1
            if any(name.startswith(prefix) for prefix in ALLOWED[folder]):
                continue
            if name in headers:
                problems.append(f"{relative} includes {name}; {folder}/ may include {', '.join(ALLOWED[folder])}")
            elif name.startswith(("torch/", "ATen/", "c10/", "Python.h", "pybind11/")):
                problems.append(f"{relative} includes {name}; PyTorch belongs in bindings/ and python/")
            elif name.startswith("hwy/") and not relative.startswith(tuple(HIGHWAY)):
                problems.append(f"{relative} includes {name}; Highway belongs in {', '.join(HIGHWAY)}")
            elif name.startswith(("cuda", "cub/", "cute/", "cutlass/")) and not relative.startswith(tuple(CUDA)):
                problems.append(f"{relative} includes {name}; CUDA belongs in {', '.join(CUDA)}")
            elif "/" not in name and (path.parent / name).exists() and folder != "bindings":
                problems.append(f'{relative} includes "{name}"; spell the path from the include root')
    return problems, count


def imports_of(path: Path) -> list[tuple[str, list[str]]]:
    """(top-level package, or "" within this one; the last parts of what is imported) of every import statement."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(alias.name.split(".")[0], [alias.name.rsplit(".", 1)[-1]]) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            top = "" if node.level else module.split(".")[0]
            found.append((top, [module.rsplit(".", 1)[-1], *(alias.name for alias in node.names)]))
    return found


def check_python(root: Path) -> tuple[list[str], int]:
    problems, count = [], 0
    for path in sorted((root / "python").rglob("*.py")):
        relative = str(path.relative_to(root))
        for top, names in imports_of(path):
            count += 1
            if top in ("", "flash_dmattn") and "reference" in names and path.name not in MAY_IMPORT_REFERENCE:
                problems.append(f"{relative} imports the reference; optimised code must not")
            allowed = {"", "torch", "flash_dmattn", *sys.stdlib_module_names, *OPTIONAL.get(path.name, ())}
            if top not in allowed:
                problems.append(f"{relative} imports {top}; torch is the only dependency at run time")
    return problems, count


def main() -> int:
    root = Path(sys.argv[1])
    problems, includes = check_cpp(root)
    more, imports = check_python(root)
    for problem in problems + more:
        print(problem)
    print(f"checked {includes} includes and {imports} imports: {len(problems + more)} problems")
    return 1 if problems or more or includes < 100 or imports < 20 else 0


if __name__ == "__main__":
    sys.exit(main())
