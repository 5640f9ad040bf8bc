"""The folders are the architecture: a module imports only from rows below its own, and the core runs without torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import ecogen

ROOT = Path(ecogen.__file__).parent

# From the top down; names on one row do not import each other.
ROWS = (
    ("__main__",),
    ("ecogen", "cli", "dashboard"),
    ("studies",),
    ("engines",),
    ("node",),
    ("relay",),
    ("tuning", "serving"),
    ("runtime",),
    ("models", "metering", "transport"),
    ("reports",),
    ("planning", "accounting"),
    ("config",),
    ("topology", "measurements"),
    ("records", "placement", "storage"),
    ("units", "errors"),
)
LEVEL = {name: level for level, row in enumerate(reversed(ROWS)) for name in row}

WITHOUT_TORCH = ("cli", "config", "topology", "records", "placement", "storage", "units", "errors", "measurements")
FOLDERS_WITHOUT_TORCH = ("reports", "accounting", "planning", "topology", "studies")


def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name."""
    paths = sorted(ROOT.rglob("*.py"))
    return {
        ".".join(("ecogen", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__"): path
        for path in paths
    }


def imports(path: Path, known: dict[str, Path]) -> Iterator[tuple[str, int]]:
    """The package's own modules that a module imports anywhere, in functions too, with the line."""
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names if alias.name.split(".")[0] == "ecogen")
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import hides its row"
            if (node.module or "").split(".")[0] == "ecogen":
                for alias in node.names:
                    full = f"{node.module}.{alias.name}"
                    yield (full if full in known else str(node.module)), node.lineno
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "import_module":
            constant = node.args[0]
            if isinstance(constant, ast.Constant) and str(constant.value).startswith("ecogen"):
                yield str(constant.value), node.lineno


def row_of(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "ecogen"


def test_every_module_has_its_row() -> None:
    assert {row_of(module) for module in modules()} <= LEVEL.keys()


def test_modules_import_only_from_rows_below_their_own() -> None:
    known, wrong = modules(), []
    for module, path in known.items():
        for imported, line in imports(path, known):
            here, there = row_of(module), row_of(imported)
            if there == "ecogen" and here == "cli":  # for the version, which is the package's own
                continue
            if here != there and LEVEL[there] >= LEVEL[here]:
                wrong.append(f"{path.relative_to(ROOT.parent)}:{line}: {here} imports {there}")
    assert not wrong, "\n".join(wrong)


def test_the_page_of_the_architecture_has_every_row() -> None:
    page = (ROOT.parent / "docs" / "architecture.md").read_text()
    table = page.partition("| row |")[2].partition("\n\n")[0]
    folders = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert not {name for name in folders if f"`{name}/`" not in table}


def test_no_module_imports_itself_over_others() -> None:
    known = modules()
    graph = {module: {name for name, _ in imports(path, known)} for module, path in known.items()}
    finished: set[str] = set()

    def visit(module: str, way: tuple[str, ...]) -> None:
        assert module not in way, " -> ".join((*way, module))
        if module not in finished:
            for imported in sorted(graph.get(module, ())):
                visit(imported, (*way, module))
            finished.add(module)

    for module in graph:
        visit(module, ())


def test_the_core_does_not_import_torch() -> None:
    names = [
        module for module in modules() if row_of(module) in WITHOUT_TORCH or row_of(module) in FOLDERS_WITHOUT_TORCH
    ]
    assert "ecogen.config" in names
    heavy = ("torch", "transformers", "peft", "grpc", "sklearn")
    program = "import sys\n" + "".join(f"import {name}\n" for name in ["ecogen", *names])
    program += f"print([name for name in {heavy!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT.parent, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_what_is_public_is_listed_and_there() -> None:
    for name in ecogen.__all__:
        assert getattr(ecogen, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = ecogen.nonsense


def test_nothing_is_unpickled() -> None:
    for module, path in modules().items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = {alias.name for alias in node.names} | {getattr(node, "module", None)}
                assert not names & {"pickle", "dill", "cloudpickle", "marshal", "shelve"}, module
