"""The dataset that every machine already has: functions of the Python standard library.

Each example asks for a function by its signature and docstring, and answers with its source. The modules are parsed,
never imported, so that nothing runs and nothing is printed. The rows depend on the Python version alone: the choice
among all functions goes by a hash of their names, not by the order of a folder.
"""

from __future__ import annotations

import ast
import hashlib
import sys
import sysconfig
import textwrap
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from laras.errors import DataError

ROWS = 340
MIN_BODY_CHARS, MAX_BODY_CHARS = 40, 260
MIN_DOCSTRING_CHARS, MAX_DOCSTRING_CHARS = 20, 400

# Packages of the library that are tests, demonstrations or applications rather than examples of library code.
_LEFT_OUT = frozenset({"test", "tests", "idlelib", "idle_test", "lib2to3", "turtledemo", "ensurepip", "site-packages"})


@dataclass(frozen=True)
class _Function:
    module: str
    name: str  # with the class, if any
    signature: str
    docstring: str
    source: str  # dedented, without the docstring


def stdlib_rows(rows: int = ROWS, library_dir: Path | None = None) -> list[dict[str, Any]]:
    """Functions of the standard library as chat rows, in a stable order.

    Args:
        rows: How many; fewer come back when the library has fewer that qualify.
        library_dir: Folder of the standard library's sources; None for the running Python's.

    Returns:
        `{"messages": [{"role": "user", ...}, {"role": "assistant", ...}]}` for each function.

    Raises:
        DataError: This Python comes without the sources of its library.
    """
    folder = library_dir or Path(sysconfig.get_path("stdlib"))
    by_source = {function.source: function for function in _functions(folder)}
    if not by_source:
        raise DataError(
            "builtin:stdlib found no source of the Python standard library on this machine",
            hint="this Python ships without its sources; set `dataset` to a file of yours",
        )
    chosen = sorted(by_source.values(), key=_stable_order)
    return [_as_row(function) for function in chosen[:rows]]


def _stable_order(function: _Function) -> bytes:
    return hashlib.sha256(f"{function.module}.{function.name}".encode()).digest()


def _as_row(function: _Function) -> dict[str, Any]:
    documentation = textwrap.indent('"""' + function.docstring + '"""', "    ")
    request = (
        f"Write this Python function of the standard library's module `{function.module}`.\n\n"
        f"{function.signature}\n{documentation}"
    )
    return {
        "messages": [
            {"role": "user", "content": request},
            {"role": "assistant", "content": function.source},
        ]
    }


def _functions(library_dir: Path) -> Iterator[_Function]:
    for path in _module_paths(library_dir):
        parts = path.relative_to(library_dir).with_suffix("").parts
        module = ".".join(part for part in parts if part != "__init__")
        try:
            with tokenize.open(path) as stream:
                text = stream.read()
            tree = ast.parse(text)
        except (SyntaxError, UnicodeDecodeError):
            continue  # the library keeps some files broken on purpose, as material for its tools
        lines = text.splitlines()
        for owner, node in _public_definitions(tree):
            function = _read_function(module, f"{owner}{node.name}", node, lines)
            if function is not None:
                yield function


def _module_paths(library_dir: Path) -> Iterator[Path]:
    for name in sorted(sys.stdlib_module_names):
        if name.startswith("_") or name in _LEFT_OUT:
            continue
        yield from (path for path in [library_dir / f"{name}.py"] if path.is_file())
        for path in sorted((library_dir / name).rglob("*.py")):
            if not _LEFT_OUT.intersection(path.relative_to(library_dir).parts):
                yield path


def _public_definitions(tree: ast.Module) -> Iterator[tuple[str, ast.FunctionDef]]:
    """Functions of the module and methods of its classes, with the prefix that names the class."""
    for node in tree.body:
        members = (
            [(f"{node.name}.", member) for member in node.body] if isinstance(node, ast.ClassDef) else [("", node)]
        )
        for owner, member in members:
            if isinstance(member, ast.FunctionDef) and not member.name.startswith("_") and not member.decorator_list:
                yield owner, member


def _read_function(module: str, name: str, node: ast.FunctionDef, lines: list[str]) -> _Function | None:
    """The function as an example; None when it has no docstring, nothing beyond it, or a size outside the limits."""
    docstring = ast.get_docstring(node)
    if docstring is None or len(node.body) < 2:
        return None
    documentation, body_end = node.body[0], node.end_lineno
    signature = textwrap.dedent("\n".join(lines[node.lineno - 1 : documentation.lineno - 1])).strip()
    body = "\n".join(lines[documentation.end_lineno : body_end]).strip("\n")
    fits = (
        MIN_BODY_CHARS <= len(body) <= MAX_BODY_CHARS and MIN_DOCSTRING_CHARS <= len(docstring) <= MAX_DOCSTRING_CHARS
    )
    if not fits or not signature:
        return None
    indent = " " * node.col_offset
    source = textwrap.dedent(f"{textwrap.indent(signature, indent)}\n{body}")
    try:
        ast.parse(source)
    except SyntaxError:
        return None  # several statements share a line with the docstring, or a string at column 0 stops the dedent
    return _Function(module, name, signature, docstring, source)
