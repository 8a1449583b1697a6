"""Who may import and include whom (docs/architecture.md): read from the sources, so that nothing has to be
built."""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import flash_dmattn
import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "python" / "flash_dmattn"
MODULES = sorted(PACKAGE.rglob("*.py"))
REFERENCE_USERS = {"_backends.py", "_selfcheck.py"}  # the backend "reference", and what compares with it
OPTIONAL = {"viz.py": {"matplotlib"}}  # imported when a function needs it


def imports(path):
    """(module, names) of every import, within functions too; relative ones with their dots."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, ()) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "." * node.level + (node.module or ""), tuple(alias.name for alias in node.names)


def test_the_sources_are_found():
    assert len(MODULES) >= 8 and PACKAGE / "reference.py" in MODULES
    assert (
        Path(flash_dmattn.__file__).parent.resolve() == PACKAGE.resolve()
        or "site-packages" in flash_dmattn.__file__
    )


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.name)
def test_torch_is_the_only_dependency_at_run_time(path):
    allowed = {"torch", "flash_dmattn"} | OPTIONAL.get(path.name, set()) | sys.stdlib_module_names
    for module, _ in imports(path):
        assert module.startswith(".") or module.split(".")[0] in allowed, module


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.name)
def test_nothing_optimised_imports_the_reference(path):
    uses = any("reference" in module.split(".") or "reference" in names for module, names in imports(path))
    assert not uses or path.name in REFERENCE_USERS


def test_the_reference_stands_alone():
    assert all(
        not module.startswith(".") and module.split(".")[0] != "flash_dmattn"
        for module, _ in imports(PACKAGE / "reference.py")
    )


def packages_loaded_by(statement):
    """Top-level packages, beside torch and the standard library, that the statement loads after torch."""
    script = (
        f"import json, sys, torch; before = set(sys.modules); {statement}; "
        "print(json.dumps(sorted(set(sys.modules) - before)))"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr[-2000:]
    return (
        {name.split(".")[0] for name in json.loads(run.stdout)}
        - set(sys.stdlib_module_names)
        - {"torch", "flash_dmattn"}
    )


def test_import_brings_nothing_but_torch():
    """And what the parts of torch that it uses load themselves."""
    ours = packages_loaded_by("import flash_dmattn, flash_dmattn.viz")
    assert ours <= packages_loaded_by("import torch.library, torch.nn.attention.flex_attention")


# Folder of the includer: what it may include beside itself, the standard library and Highway.
INCLUDE_RULES = {
    "include/flash_dmattn": {"flash_dmattn"},
    "src/core": {"flash_dmattn", "core"},
    "src/cpu": {"flash_dmattn", "core", "cpu"},
    "bindings/torch": {"flash_dmattn", "torch", ""},
    "examples/cpp": {"flash_dmattn", ""},
}
SOURCES = [
    path
    for folder in INCLUDE_RULES
    for path in sorted((ROOT / folder).rglob("*"))
    if path.suffix in (".h", ".cpp", ".cc", ".hpp", ".inc")
]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_include_rules(path):
    folder = next(folder for folder in INCLUDE_RULES if path.is_relative_to(ROOT / folder))
    for mark, name in re.findall(r'^\s*#\s*include\s*([<"])([^>"]+)[>"]', path.read_text(), re.MULTILINE):
        top = name.split("/")[0] if "/" in name else ""
        if mark == "<":
            allowed = top in ("", "torch" if folder == "bindings/torch" else "") or (
                top == "hwy" and folder == "src/cpu"
            )
        else:
            test_hook = (
                folder == "bindings/torch" and name == "cpu/bugs.h"
            )  # compiled into the test library alone
            allowed = top in INCLUDE_RULES[folder] or (top == "hwy" and folder == "src/cpu") or test_hook
        assert allowed, f"{path.relative_to(ROOT)} includes {name}"


def test_no_third_party_code_in_public_headers():
    headers = sorted((ROOT / "include").rglob("*.h"))
    assert len(headers) >= 4
    for header in headers:
        assert not re.search(r"torch|hwy|cuda", " ".join(re.findall(r"#\s*include.*", header.read_text())))
