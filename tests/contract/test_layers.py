"""What the shape of the code promises."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import laras

PACKAGE = Path(laras.__file__).parent
HEAVY = ("torch", "transformers", "datasets", "trl", "peft", "accelerate", "pyarrow")
LIGHT = ("laras", "laras.errors", "laras.config", "laras.records", "laras.progress", "laras.pipeline")


def test_the_light_layers_import_no_heavy_library() -> None:
    modules = [*LIGHT, *(module_name(path) for folder in ("data", "planning") for path in python_files(folder))]
    code = f"import sys, importlib\nfor m in {modules!r}: importlib.import_module(m)\n"
    code += f"print([m for m in {HEAVY!r} if m in sys.modules])"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "[]"


def test_help_loads_neither_configuration_nor_records() -> None:
    code = "import sys, laras.cli.main; print([m for m in ('pydantic', 'yaml', 'laras.records') if m in sys.modules])"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "[]"


def test_a_verb_refuses_a_folder_that_is_no_run_before_it_loads_anything_heavy(tmp_path: Path) -> None:
    heavy = (*HEAVY, "matplotlib")
    code = f"""if True:
        import sys
        from laras.cli.main import main
        for verb in ("report", "export", "chat", "test", "resume"):
            sys.argv = ["laras", verb, {str(tmp_path)!r}]
            try:
                main()
            except SystemExit as exit:
                print(verb, exit.code, [m for m in {heavy!r} if m in sys.modules])
        """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [f"{verb} 7 []" for verb in ("report", "export", "chat", "test", "resume")]
    assert done.stderr.count("is not a run") == 5


def test_training_code_has_no_way_to_name_the_test_set() -> None:
    for folder in ("training", "models", "evaluation", "planning"):
        for path in python_files(folder):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
            names |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
            for node in ast.walk(tree):
                if isinstance(node, ast.Import | ast.ImportFrom):
                    module = getattr(node, "module", None) or ""
                    names |= {word for alias in node.names for word in f"{module}.{alias.name}".split(".")}
            assert not names & {"open_sealed", "unseal", "seal_test", "sealed"}, path
            docstrings = {
                ast.get_docstring(node, clean=False)
                for node in ast.walk(tree)
                if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
            }
            texts = {
                node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)
            }
            assert not [text for text in texts - docstrings if "sealed" in text], path


def python_files(folder: str) -> list[Path]:
    return sorted((PACKAGE / folder).rglob("*.py"))


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
