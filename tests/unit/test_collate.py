"""Batches are rectangular, masked and unlabelled where padded."""

import subprocess
import sys

import pytest

from laras.data.collate import PadCollator, padded_length


def row(length, first=1):
    ids = list(range(first, first + length))
    return {"input_ids": ids, "labels": [-100, *ids[1:]], "length": length, "row": 0}


def test_rows_are_padded_on_the_right_to_a_multiple_of_eight():
    batch = PadCollator(pad_token_id=9)([row(3), row(10)])
    assert set(batch) == {"input_ids", "labels", "attention_mask"}
    assert all(value.shape == (2, 16) for value in batch.values())
    assert batch["input_ids"][0].tolist() == [1, 2, 3] + [9] * 13
    assert batch["labels"][0].tolist() == [-100, 2, 3] + [-100] * 13
    assert batch["attention_mask"].sum(dim=1).tolist() == [3, 10]
    assert batch["input_ids"][1, :10].tolist() == list(range(1, 11))


def test_a_tokenizer_without_padding_token_pads_with_zero():
    assert PadCollator(None)([row(7)])["input_ids"][0, -1].item() == 0


@pytest.mark.parametrize(("length", "padded"), [(1, 8), (8, 8), (9, 16)])
def test_padded_length(length, padded):
    assert padded_length(length) == padded


def test_rows_that_do_not_line_up_are_refused():
    with pytest.raises(ValueError, match="row 1 of the batch has 2 tokens and 1 labels"):
        PadCollator()([row(4), {"input_ids": [1, 2], "labels": [1]}])
    with pytest.raises(ValueError, match="at least one row"):
        PadCollator()([])


def test_importing_the_collator_imports_no_torch():
    program = "import sys, laras.data.collate; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
