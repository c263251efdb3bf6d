"""The built-in dataset is the same on every call, complete code, and silent about the machine."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from laras.data.builtin import MAX_BODY_CHARS, ROWS, stdlib_rows
from laras.errors import DataError


@pytest.fixture(scope="module")
def rows():
    return stdlib_rows()


def library(tmp_path: Path, **modules: str) -> Path:
    for name, text in modules.items():
        (tmp_path / f"{name}.py").write_text(text, encoding="utf-8")
    return tmp_path


GREETING = '''
def greet(name,
          loud=False):
    """Return a polite greeting for the person of that name."""
    greeting = f"Hello {name}, how are you today?"
    return greeting.upper() if loud else greeting
'''


def test_there_are_enough_distinct_rows(rows):
    assert len(rows) == ROWS
    assert len({row["messages"][1]["content"] for row in rows}) == ROWS


def test_every_answer_is_one_whole_function_named_in_the_request(rows):
    for row in rows:
        request, answer = row["messages"]
        assert (request["role"], answer["role"]) == ("user", "assistant")
        (function,) = ast.parse(answer["content"]).body
        assert isinstance(function, ast.FunctionDef)
        assert f"def {function.name}" in request["content"]
        assert ast.get_docstring(function) is None
        assert len(answer["content"]) < MAX_BODY_CHARS + 500


def test_another_process_gives_the_same_rows(rows):
    program = "import json,sys; from laras.data.builtin import stdlib_rows; json.dump(stdlib_rows(), sys.stdout)"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert json.loads(result.stdout) == rows


def test_no_path_of_the_machine_is_in_the_text(rows):
    text = "\n".join(message["content"] for row in rows for message in row["messages"])
    assert sysconfig.get_path("stdlib") not in text
    assert str(Path.home()) not in text


def test_no_module_is_imported():
    program = (
        "import sys; from laras.data.builtin import stdlib_rows; stdlib_rows(); "
        "sys.exit('antigravity' in sys.modules or 'tkinter' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_a_function_becomes_request_and_source_without_its_docstring(tmp_path):
    (row,) = stdlib_rows(library_dir=library(tmp_path, shutil=GREETING))
    request, answer = (message["content"] for message in row["messages"])
    assert "`shutil`" in request
    assert "def greet(name,\n          loud=False):" in request
    assert '"""Return a polite greeting' in request
    assert answer.startswith("def greet(name,\n          loud=False):\n    greeting = f")
    assert answer.endswith("else greeting")


def test_methods_are_dedented(tmp_path):
    inside = "class Person:\n" + "\n".join(f"    {line}" for line in GREETING.splitlines())
    (row,) = stdlib_rows(library_dir=library(tmp_path, shutil=inside))
    (reference,) = stdlib_rows(library_dir=library(tmp_path, shutil=GREETING))
    assert row == reference


def test_functions_that_cannot_be_an_example_are_left_out(tmp_path):
    unfit = {
        "abc": GREETING.replace("greet(", "_greet("),
        "ast": "@staticmethod" + GREETING,
        "bdb": '\ndef f():\n    """A docstring of a good size and nothing else."""\n',
        "bz2": "def broken(:\n",
        "cgi": GREETING.replace("person", "person " * 100),
        "cmd": '\ndef f(): """A docstring of a good size."""; x = 1; y = 2; return x + y + 11111111111111111\n',
        "csv": GREETING.replace("def greet", "async def greet"),
        "dis": GREETING.replace('f"Hello', f'f"{"Hello" * 200}'),
    }
    rows = stdlib_rows(library_dir=library(tmp_path, shutil=GREETING, **unfit))
    assert len(rows) == 1


def test_code_whose_strings_stop_the_dedent_is_left_out(tmp_path):
    method = (
        'class C:\n    def f(self):\n        """Return a text of two lines, the second at column 0."""\n'
        '        return """first line of the text\nsecond line of the text, at column 0"""\n'
    )
    rows = stdlib_rows(library_dir=library(tmp_path, shutil=GREETING, abc=method))
    assert len(rows) == 1


def test_packages_are_read_and_their_tests_are_not(tmp_path):
    for folder in (tmp_path / "json", tmp_path / "json" / "tests"):
        folder.mkdir()
        library(folder, tool=GREETING.replace("Hello", f"Hello from {folder.name}"))
    (row,) = stdlib_rows(library_dir=tmp_path)
    assert "Hello from json" in row["messages"][1]["content"]
    assert "`json.tool`" in row["messages"][0]["content"]


def test_a_python_without_sources_gets_a_clear_error(tmp_path):
    with pytest.raises(DataError, match="no source") as caught:
        stdlib_rows(library_dir=tmp_path)
    assert "dataset" in str(caught.value)
