"""The notebook for Colab runs from top to bottom, here on a tiny model and fewer rows."""

from __future__ import annotations

from pathlib import Path

import nbformat
from nbclient import NotebookClient

from tiny_models import base_model

NOTEBOOK = Path(__file__).parents[2] / "notebooks" / "colab_training.ipynb"


def test_every_cell_of_the_notebook_runs(tmp_path: Path) -> None:
    base_model("llama", tmp_path / "model", max_position_embeddings=4096)
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    changed = 0
    small = 'model_name_or_path="model", limit=60, max_steps=2'
    for cell in notebook.cells:
        for whole, short in (("num_train_epochs=1", small), ("max_new_tokens=80", "max_new_tokens=4")):
            changed += whole in cell.source
            cell.source = cell.source.replace(whole, short)
    assert changed == 2
    NotebookClient(notebook, timeout=250, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = "".join(str(cell.get("outputs")) for cell in notebook.cells)
    assert "tuned" in outputs and "perplexity" in outputs and "'finished', 2" in outputs
    assert outputs.count("image/png") == 2


def test_the_notebook_is_kept_with_its_outputs() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    text = str([cell.outputs for cell in code])
    assert "error" not in {output.output_type for cell in code for output in cell.outputs}
    assert "image/png" in text and "/root" not in text and "/home" not in text
