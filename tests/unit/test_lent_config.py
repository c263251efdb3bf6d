"""A new run that starts from a sweep's final model lies beside the sweep, however it was asked for."""

from __future__ import annotations

from pathlib import Path

import pytest

from example_sweep import write_example_sweep
from laras.cli.options import read_config
from laras.sweep_record import lent_config


@pytest.mark.parametrize("overrides", [{"learning_rate": 1e-3}, ["learning_rate=1e-3"]])
def test_what_a_sweep_lends_is_for_the_folder_beside_it(tmp_path: Path, overrides: object) -> None:
    sweep = write_example_sweep(tmp_path / "sweep")
    config = lent_config(sweep, overrides)  # type: ignore[arg-type]
    assert (config.output_dir, config.run_name, config.learning_rate) == (str(tmp_path), None, 1e-3)
    assert read_config(["learning_rate=1e-3"], sweep)[0] == config
