"""Packing loses no document, wastes at most 2% of the slots, and its batches always have the same shape."""

import math
import random
import subprocess
import sys

import pytest

from laras.data.pack import PackCollator, PackShape, pack_documents, pack_shape


def lengths(count, seed=0, cap=4096):
    generator = random.Random(seed)
    return [max(1, min(cap, int(350 * math.exp(0.9 * generator.gauss(0, 1))))) for _ in range(count)]


def row(length, first=1):
    ids = list(range(first, first + length))
    return {"input_ids": ids, "labels": ids}


@pytest.mark.parametrize("budget", [4096, 8192, 16384])
def test_every_document_is_packed_once_and_98_percent_of_the_slots_are_used(budget):
    documents = lengths(3000)
    bins = pack_documents(documents, budget, seed=1)
    assert sorted(index for one in bins for index in one) == list(range(3000))
    assert max(sum(documents[index] for index in one) for one in bins) <= budget
    assert sum(documents) / (len(bins) * budget) >= 0.98


def test_bins_hold_about_equally_many_documents():
    bins = pack_documents(lengths(3000), 16384, seed=1)
    counts = [len(one) for one in bins]
    assert max(counts) <= 1.5 * sum(counts) / len(counts)


def test_documents_nearly_as_large_as_a_bin_fall_back_to_best_fit():
    documents = [60] * 10 + [40] * 10 + [100]
    assert len(pack_documents(documents, 100, seed=0)) == 11


def test_documents_that_no_even_bins_hold_share_a_bin_where_they_can():
    documents = [90, *[51] * 20, 10]
    bins = pack_documents(documents, 100, seed=0)
    assert len(bins) == 21
    assert [0, 21] in bins
    assert len(pack_documents([5, 5, 4, 3, 3], 10, seed=0)) == 2  # evenly it would be three


@pytest.mark.parametrize(
    ("documents", "counts"),
    [([5, 5, 3, 3, 2, 2], [3, 3]), ([6, 6, 6, 6, 1, 1, 1, 1], [2, 2, 2, 2])],
    ids=["full to the last token", "one bin more than the tokens need"],
)
def test_bins_are_even_as_long_as_no_bin_is_lost_by_it(documents, counts):
    assert [len(one) for one in pack_documents(documents, 10, seed=0)] == counts


def test_the_seed_decides_which_documents_share_a_bin_and_which_bin_comes_first():
    alike = [{frozenset(one) for one in pack_documents([4] * 64, 8, seed)} for seed in (1, 2)]
    assert alike[0] != alike[1]
    alone = list(range(51, 101))
    lengths_in_order = [alone[one[0]] for one in pack_documents(alone, 100, seed=1)]
    assert lengths_in_order != sorted(alone, reverse=True)


def test_packing_depends_on_the_seed_alone():
    documents = lengths(200)
    assert pack_documents(documents, 8192, 3) == pack_documents(documents, 8192, 3)
    assert pack_documents(documents, 8192, 3) != pack_documents(documents, 8192, 4)


def test_a_document_that_no_bin_holds_is_named():
    with pytest.raises(ValueError, match="document 1 has 9 tokens; a bin holds 1 to 8"):
        pack_documents([8, 9], 8, 0)
    with pytest.raises(ValueError, match="document 0 has 0 tokens"):
        pack_documents([0], 8, 0)
    assert pack_documents([], 8, 0) == []
    assert pack_documents([1], 8, 0) == pack_documents([8], 8, 0) == [[0]]


def test_positions_restart_and_the_filling_has_no_label():
    collate = PackCollator(budget_tokens=16, max_documents=6, max_length=4, max_targets=8, pad_token_id=9)
    batch = collate([row(3), row(4, 20)])
    assert batch["input_ids"].shape == batch["labels"].shape == batch["position_ids"].shape == (1, 16)
    assert batch["input_ids"][0].tolist() == [1, 2, 3, 20, 21, 22, 23] + [9] * 9
    assert batch["labels"][0].tolist() == [-100, 2, 3, -100, 21, 22, 23] + [-100] * 9
    assert batch["position_ids"][0].tolist() == [0, 1, 2, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0]
    assert batch["cu_seqlens"].tolist() == [0, 3, 7, 11, 15, 16, 16]
    assert batch["target_positions"].tolist() == [0, 1, 3, 4, 5, 15, 15, 15]


def test_a_shape_is_no_larger_than_its_bins_need():
    # Two documents leave 256 slots, one more of the longest; 300 targets are rounded up to 3 times 128.
    assert pack_shape([[0, 1]], [300, 212], [200, 100], 768, 256) == PackShape(768, 3, 384)
    assert pack_shape([[0]], [100], [90], 100, 100) == PackShape(100, 1, 100)
    assert pack_shape([], [], [], 256, 256) == PackShape(256, 1, 128)


def test_all_bins_of_a_run_have_one_shape():
    documents = lengths(300)
    bins = pack_documents(documents, 8192, 0)
    shape = pack_shape(bins, documents, documents, 8192, 4096)
    collate = PackCollator(8192, shape.max_documents, 4096, shape.max_targets)
    batches = [collate([row(documents[index]) for index in one]) for one in bins]
    assert len({tuple((key, value.shape) for key, value in batch.items()) for batch in batches}) == 1
    assert all((batch["cu_seqlens"].diff() <= 4096).all() for batch in batches)


def test_rows_beyond_the_shape_are_refused():
    with pytest.raises(ValueError, match="do not fit a bin of 8"):
        PackCollator(8, 4)([row(5), row(4)])
    with pytest.raises(ValueError, match="5 documents do not fit a batch of at most 4"):
        PackCollator(8, 4)([row(1)] * 4)
    with pytest.raises(ValueError, match="7 target tokens do not fit a batch of at most 4"):
        PackCollator(8, 4, max_targets=4)([row(8)])


def test_a_batch_may_be_full_of_documents_and_of_targets():
    batch = PackCollator(8, 2, max_targets=6)([row(4), row(4)])
    assert batch["target_positions"].tolist() == [0, 1, 2, 4, 5, 6]
    assert batch["cu_seqlens"].tolist() == [0, 4, 8]


def test_importing_the_packer_imports_no_torch():
    program = "import sys, laras.data.pack; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
