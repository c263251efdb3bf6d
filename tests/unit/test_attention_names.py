"""An attention that cannot run is refused by name before anything is read."""

from __future__ import annotations

from pathlib import Path

import pytest

import laras
from laras.config_file import load_config
from laras.errors import ConfigError
from laras.planning.attention import has_kernel, require_attention


def test_an_unknown_name_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError) as refused:
        load_config(None, {"attn_implementation": "flash_attention_9"})
    assert "'flash_attention_9'" in str(refused.value) and "flash_attention_2" in str(refused.value)


def test_a_kernel_whose_package_is_absent_is_refused_before_a_run_is_made(tmp_path: Path) -> None:
    if has_kernel("flash_attention_3"):
        pytest.skip("it is installed here")
    with pytest.raises(ConfigError, match="needs the package flash-attn-3") as refused:
        laras.train(attn_implementation="flash_attention_3", output_dir=str(tmp_path / "runs"))
    assert "auto" in (refused.value.hint or "")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("name", ["auto", "eager", "sdpa", "varlen", "flex_attention"])
def test_what_torch_brings_needs_nothing(name: str) -> None:
    require_attention(name)
