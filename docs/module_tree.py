"""The tree of the package in the README, a phrase a file, written from the files themselves.

python docs/module_tree.py    # writes it anew; a test compares
"""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
BEGIN, END = "<!-- tree: docs/module_tree.py -->\n", "<!-- end of the tree -->\n"
_COLUMN = 28


def module_tree() -> str:
    """A fenced block with every module of the package and the first sentence of its docstring."""
    package = ROOT / "src" / "laras"
    lines = ["src/laras/"]
    shown: set[Path] = set()
    for path in sorted(package.rglob("*.py"), key=lambda file: (file.parent != package, file.parent.parts, file.name)):
        if path.name == "__init__.py":
            continue
        folder = path.parent.relative_to(package)
        for level in reversed((folder, *folder.parents)):
            if level.parts and level not in shown:
                shown.add(level)
                lines.append(f"{'  ' * len(level.parts)}{level.name}/")
        name = "  " * (len(folder.parts) + 1) + path.name
        lines.append(f"{name:<{_COLUMN}} {_phrase(path)}")
    return "```\n" + "\n".join(lines) + "\n```\n"


def with_tree(text: str) -> str:
    """The README with the tree of today between its marks."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{module_tree()}\n{END}{after}"


def _phrase(path: Path) -> str:
    text = " ".join((ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").split())
    sentence, stop, _ = text.partition(". ")
    return sentence.rstrip(".") if stop or text.endswith(".") else text


if __name__ == "__main__":
    README.write_text(with_tree(README.read_text(encoding="utf-8")), encoding="utf-8")
