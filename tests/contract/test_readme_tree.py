"""The README shows every module of the package, with the phrase that the module says of itself."""

from __future__ import annotations

import runpy
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_tree_in_the_readme_is_that_of_the_package() -> None:
    tree = runpy.run_path(str(ROOT / "docs" / "module_tree.py"))
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert tree["BEGIN"] in readme and tree["END"] in readme
    assert readme == tree["with_tree"](readme), "write it anew: python docs/module_tree.py"
