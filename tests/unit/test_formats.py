import pytest
from hypothesis import given
from hypothesis import strategies as st

from laras.data.formats import Layout, detect_layout, normalize_row
from laras.errors import DataError

USER = {"role": "user", "content": "Hi"}
ASSISTANT = {"role": "assistant", "content": "Hello"}
MESSAGES = Layout("messages", {"messages": "messages"})
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["messages", "role", "content", "from", "value", "text", "tool_calls"]), inner, max_size=3
        )
    ),
    max_leaves=12,
)


def reason(messages):
    result = normalize_row({"messages": messages}, MESSAGES)
    assert isinstance(result, str)
    return result


@pytest.mark.parametrize(
    ("columns", "format"),
    [
        (["text"], "text"),
        (["id", "prompt", "completion"], "prompt-completion"),
        (["text", "messages"], "messages"),
        (["instruction", "input", "output"], "alpaca"),
        (["instruction", "output", "text"], "alpaca"),
        (["conversations", "system"], "sharegpt"),
    ],
)
def test_the_format_is_found_by_the_columns(columns, format):
    assert detect_layout(columns).format == format


def test_a_given_format_wins_over_the_columns():
    assert detect_layout(["messages", "text"], "text") == Layout("text", {"text": "text"})


def test_columns_are_mapped_to_fields():
    layout = detect_layout(["question", "answer", "text"], columns={"prompt": "question", "completion": "answer"})
    assert layout == Layout("prompt-completion", {"prompt": "question", "completion": "answer"})
    assert normalize_row({"question": "2+2?", "answer": "4"}, layout) == {"prompt": "2+2?", "completion": "4"}
    assert normalize_row({"question": "2+2?", "answer": None}, layout) == "missing field 'answer'"


def test_a_mapped_column_is_not_found_again_under_its_own_name():
    layout = detect_layout(["text", "completion"], columns={"prompt": "text"})
    assert layout.format == "prompt-completion"


@pytest.mark.parametrize(
    ("columns", "wanted", "said"),
    [
        (["promt", "completion"], "auto", "did you mean 'prompt' by 'promt'?"),
        (["question", "answer"], "auto", "did you mean 'completion' by 'answer'?"),
        (["instruction", "outputs"], "alpaca", "did you mean 'output' by 'outputs'?"),
        (["id", "x"], "auto", "no known format has these columns; the data has 'id', 'x'"),
        (["chosen", "rejected"], "auto", "did you mean 'messages' by 'chosen'?"),
        (["prompt", "chosen", "rejected"], "auto", "did you mean 'completion' by 'chosen'?"),
        (["id"], "alpaca", "format alpaca needs 'instruction', 'output'"),
        ([], "auto", "the data has no columns"),
    ],
)
def test_wrong_columns_are_named_with_the_likely_meaning(columns, wanted, said):
    with pytest.raises(DataError) as caught:
        detect_layout(columns, wanted)
    assert said in caught.value.message
    assert caught.value.hint
    if "did you mean" in said:
        assert "columns: {" in caught.value.hint


def test_a_wrong_mapping_names_every_problem_at_once():
    with pytest.raises(DataError) as caught:
        detect_layout(["question", "answer"], columns={"promt": "question", "completion": "anwser"})
    assert caught.value.problems == (
        "promt: no field of any format; did you mean 'prompt'?",
        "completion: the data has no column 'anwser'; did you mean 'answer'?",
    )
    with pytest.raises(DataError) as caught:
        detect_layout(["a"], "text", {"output": "a", "text": "b"})
    assert caught.value.problems[0] == "output: no field of text; there are 'text'"


def test_every_format_becomes_one_of_three_kinds():
    chat = {"messages": [USER, ASSISTANT]}
    assert normalize_row({"text": "Once"}, detect_layout(["text"])) == {"text": "Once"}
    assert normalize_row(chat, MESSAGES) == chat
    sharegpt = {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}
    assert normalize_row(sharegpt, detect_layout(sharegpt)) == chat
    alpaca = {"instruction": "Add", "input": "2 2", "output": "4", "system": "Be terse"}
    assert normalize_row(alpaca, detect_layout(alpaca)) == {
        "messages": [
            {"role": "system", "content": "Be terse"},
            {"role": "user", "content": "Add\n\n2 2"},
            {"role": "assistant", "content": "4"},
        ]
    }


def test_alpaca_takes_an_empty_input_and_a_request_in_the_input():
    layout = detect_layout(["instruction", "input", "output"])
    for row in ({"instruction": "Hi", "input": "", "output": "4"}, {"instruction": "", "input": "Hi", "output": "4"}):
        assert normalize_row(row, layout)["messages"][0] == USER
    assert normalize_row({"instruction": "", "input": " ", "output": "4"}, layout) == "empty text in 'instruction'"


def test_a_system_field_and_an_empty_system_turn():
    layout = detect_layout(["conversations", "system"])
    row = {"system": "S", "conversations": [USER, ASSISTANT]}
    assert normalize_row(row, layout)["messages"][0] == {"role": "system", "content": "S"}
    row = {"system": None, "conversations": [{"role": "system", "content": ""}, USER, ASSISTANT]}
    assert normalize_row(row, layout) == {"messages": [USER, ASSISTANT]}


def test_tools_keep_their_calls_and_arrow_nones_are_ignored():
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}], "name": None}
    answer = {"role": "tool", "content": "", "tool_call_id": "1", "tool_calls": None}
    result = normalize_row({"messages": [USER, call, answer, ASSISTANT]}, MESSAGES)
    assert result["messages"][1] == {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f"}}]}
    assert result["messages"][2] == {"role": "tool", "content": "", "tool_call_id": "1"}


def test_an_answer_that_says_so_carries_no_loss_and_any_other_number_is_refused():
    marks = ({"weight": 0}, {"train": True}, {"train": False})
    without, plain = [turn for mark in marks for turn in (USER, {**ASSISTANT, **mark})], [USER, ASSISTANT] * 3
    assert normalize_row({"messages": without}, MESSAGES) == {"messages": plain, "without_loss": [0, 2]}
    weighted = [{**USER, "weight": 0}, {**ASSISTANT, "weight": 1.0, "training": None}]
    assert normalize_row({"messages": weighted}, MESSAGES) == {"messages": [USER, ASSISTANT]}
    assert "message 2: weight is 0.5, neither 0 nor 1" in reason([USER, {**ASSISTANT, "weight": 0.5}])


@pytest.mark.parametrize("given", [[{"name": "f"}], '[{"name": "f"}]'])
def test_tools_reach_the_template_as_objects(given):
    layout = Layout("messages", {"messages": "messages", "tools": "tools"})
    row = {"messages": [USER, ASSISTANT], "tools": given}
    assert normalize_row(row, layout) == {"messages": [USER, ASSISTANT], "tools": [{"name": "f"}]}
    for none in (None, [], "", "[]"):
        assert normalize_row({**row, "tools": none}, layout) == {"messages": [USER, ASSISTANT]}
    assert "field 'tools' is a text that is no JSON" in normalize_row({**row, "tools": "f("}, layout)
    assert "field 'tools' is a number (3), not a list of objects" in normalize_row({**row, "tools": 3}, layout)


def test_text_parts_are_joined_and_other_parts_refused():
    parts = {"role": "user", "content": [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]}
    assert normalize_row({"messages": [parts, ASSISTANT]}, MESSAGES) == {"messages": [USER, ASSISTANT]}
    assert "content is a list, not text" in reason([{"role": "user", "content": [{"type": "image"}]}, ASSISTANT])


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ([1], "not an object but a list"),
        ("x", "not an object but a text"),
        (None, "not an object but null"),
        ({}, "missing field 'text'"),
        ({"text": None}, "missing field 'text'"),
        ({"text": " \n"}, "empty text in 'text'"),
        ({"text": 3}, "field 'text' is a number (3), not text"),
        ({"text": True}, "field 'text' is a boolean (True), not text"),
        ({"text": {}}, "field 'text' is an object, not text"),
        ({"text": b"x"}, "field 'text' is binary, not text"),
    ],
)
def test_bad_rows_say_why(row, said):
    assert normalize_row(row, detect_layout(["text"])) == said


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ("Hi", "field 'messages' is a text, not a list of messages"),
        ([], "empty conversation in 'messages'"),
        ([USER], "no assistant turn"),
        ([3], "message 1: not an object but a number (3)"),
        ([{"content": "Hi"}], "message 1: missing field 'role'"),
        ([{"role": "user"}], "message 1: missing field 'content'"),
        ([USER, {"role": "asistant", "content": "x"}], "message 2: unknown role 'asistant'; did you mean 'assistant'?"),
        ([{"role": 7, "content": "x"}], "message 1: unknown role 7"),
        ([USER, {"role": "assistant", "content": " "}], "message 2: empty text in the assistant turn"),
        ([{"role": "user", "content": 1}], "message 1: content is a number (1), not text"),
        ([ASSISTANT, USER], "message 1: wrong role order, 'assistant' at the start"),
        ([USER, USER, ASSISTANT], "message 2: wrong role order, 'user' after 'user'"),
        ([USER, ASSISTANT, ASSISTANT], "message 3: wrong role order, 'assistant' after 'assistant'"),
        ([USER, {"role": "system", "content": "S"}], "message 2: wrong role order, 'system' after 'user'"),
        ([USER, {"role": "tool", "content": "S"}], "message 2: wrong role order, 'tool' after 'user'"),
    ],
)
def test_bad_conversations_say_where_and_why(messages, said):
    assert reason(messages) == said


@given(json_values)
def test_any_row_gives_an_example_or_a_reason(row):
    for layout in (MESSAGES, Layout("text", {"text": "text"}), Layout("sharegpt", {"conversations": "messages"})):
        result = normalize_row(row, layout)
        if isinstance(result, dict) and "messages" in result:
            assert any(message["role"] == "assistant" for message in result["messages"])
        else:
            assert result
