"""The public surface: as small as the command line, and free to import."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import laras


def test_the_public_surface_is_this_and_nothing_more() -> None:
    verbs = ["configure", "export", "inspect", "plan", "report", "resume", "sweep", "test", "train"]
    others = ["LarasError", "Observer", "ProgressBar", "RunConfig", "__version__"]
    assert sorted(laras.__all__) == sorted([*others, *verbs])
    for name in verbs:
        function = getattr(laras, name)
        told, signature = inspect.getdoc(function) or "", inspect.signature(function)
        assert signature.return_annotation is not inspect.Signature.empty
        assert [argument for argument in signature.parameters if f"{argument}: " not in told.split("Args:")[1]] == []
        assert "Raises:" in told
    with pytest.raises(AttributeError, match="nonsense"):
        _ = laras.nonsense


def test_importing_the_package_loads_nothing_else() -> None:
    code = "import sys, laras; print([m for m in ('pydantic', 'yaml', 'torch', 'numpy') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_a_configuration_may_be_a_file_a_mapping_a_config_or_nothing(tmp_path: Path) -> None:
    path = tmp_path / "laras.yaml"
    path.write_text("seed: 7\n", encoding="utf-8")
    for given in (path, str(path), {"seed": 7}, laras.configure(seed=7)):
        config = laras.configure(given, lora_r=4)
        assert (config.seed, config.lora_r) == (7, 4)
    assert laras.configure().dataset == "builtin:stdlib"
    with pytest.raises(laras.LarasError, match="did you mean 'seed'"):
        laras.configure(sed=1)
