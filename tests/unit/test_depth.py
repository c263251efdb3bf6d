"""A few layers stand for a whole decoder where its kinds of layers repeat."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from laras.planning.depth import find_repeat

PATTERNS = {  # kinds of layers, and those that are recorded
    "A" * 32: "AAAAA",
    "AAAF" * 9: "AAAFAAAF",  # SmolLM3, Cohere2, Qwen3-Next
    "SSSSSF" * 5 + "SSSS": "SSSSSFSSSS",  # Gemma 3
    "AB" * 12: "ABABAB",  # gpt-oss, Gemma 2
    "D" + "M" * 26: "DMMMM",  # one dense layer before the experts
    "DDD" + "M" * 58: "DDDMMMM",  # DeepSeek V3
    "A" * 24 + "B" * 4: "AAAABBBB",
    "ccfccfccfcfcfcfc": "ccfccfccfcfc",  # LFM2
}


@pytest.mark.parametrize("kinds", PATTERNS)
def test_the_fewest_layers_that_continue_the_pattern_are_recorded(kinds):
    repeat = find_repeat(kinds)
    assert "".join(kinds[layer] for layer in repeat.kept(len(kinds))) == PATTERNS[kinds]


@pytest.mark.parametrize("kinds", ["", "A", "AAAAA", "ABCDEFGH", "AB" * 3])
def test_a_decoder_without_a_shorter_stand_in_is_recorded_whole(kinds):
    assert find_repeat(kinds) is None


@given(st.text("AB", max_size=4), st.text("ABC", min_size=1, max_size=4), st.integers(1, 8), st.text("AB", max_size=4))
def test_copies_of_the_stretch_between_what_is_kept_are_the_whole_decoder(before, period, times, after):
    kinds = before + period * times + after
    repeat = find_repeat(kinds)
    if repeat is None:
        return
    kept = [kinds[layer] for layer in repeat.kept(len(kinds))]
    stretch = kept[repeat.first : repeat.end]
    assert len(kept) == repeat.recorded < len(kinds)
    assert "".join(kept[: repeat.first] + stretch * repeat.copies(len(kinds)) + kept[repeat.end :]) == kinds
    # Every copy has the same neighbours, and neither end of the decoder is one.
    assert kept[repeat.first - 1] == stretch[-1] and kept[repeat.end] == stretch[0]
    assert repeat.first >= 2 and repeat.end <= len(kept) - 2
