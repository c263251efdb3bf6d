"""The loss stands on the assistant's turns and their end-of-turn tokens, whatever the template."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from laras.data.masks import SpecialTokens, range_by_offsets
from laras.data.render import Encoded, RenderProblem, build_renderer
from laras.errors import DataError

TEMPLATES = Path(__file__).parents[1] / "fixtures" / "templates"
END_OF_TURN = {
    "chatml": "<|im_end|>",
    "chatml_marked": "<|im_end|>",
    "chatml_marked_open": "<|im_end|>",
    "llama3": "<|eot_id|>",
    "gemma": "<end_of_turn>",
    "mistral": "</s>",
    "phi": "<|end|>",
}
TRIMMING = {"llama3", "gemma"}
SPECIAL = [
    *("<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    *("<start_of_turn>", "<end_of_turn>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"),
]


def make_tokenizer(**special: str) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["user assistant system model the answer\n\n is the question\n"] * 4, trainer)
    # pad, eos and the end of a turn are one token in many models: masking by id would lose it.
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>", **special}
    return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **names)


TOKENIZER = make_tokenizer()


def template(name: str) -> str:
    return (TEMPLATES / f"{name}.jinja").read_text()


def chat(*contents: str, system: str | None = None) -> dict:
    first = [] if system is None else [{"role": "system", "content": system}]
    turns = [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]
    return {"messages": [*first, *turns]}


def encode(example: dict, name: str, **options) -> Encoded:
    (result,) = build_renderer(TOKENIZER, "messages", options.pop("only", True), template(name)).encode([example])
    assert isinstance(result, Encoded), result
    return result


def learned(encoded: Encoded, tokenizer=TOKENIZER) -> str:
    return tokenizer.decode([label for label in encoded.labels if label != -100])


contents = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
conversations = st.lists(st.tuples(contents, contents), min_size=1, max_size=3).map(
    lambda turns: [content for pair in turns for content in pair]
)
each_template = pytest.mark.parametrize("name", END_OF_TURN)


@each_template
@settings(max_examples=40, deadline=None)
@given(turns=conversations)
def test_decoding_gives_the_rendered_text(name, turns):
    encoded = encode(chat(*turns), name)
    expected = TOKENIZER.apply_chat_template(chat(*turns)["messages"], chat_template=template(name), tokenize=False)
    assert encoded.text == expected
    assert TOKENIZER.decode(encoded.input_ids) == encoded.text
    assert len(encoded.labels) == len(encoded.input_ids)


@each_template
@settings(max_examples=40, deadline=None)
@given(turns=conversations)
def test_loss_stands_on_every_answer_and_its_end_of_turn_and_nowhere_else(name, turns):
    # A visible first and last character keep tokens from reaching over the edge of a turn.
    turns = [f"<{turn}>" for turn in turns]
    encoded = encode(chat(*turns), name)
    lead = " " if name == "mistral" else ""
    assert learned(encoded) == "".join(lead + answer + END_OF_TURN[name] for answer in turns[1::2])


@each_template
@settings(max_examples=40, deadline=None)
@given(turns=conversations)
def test_answers_with_any_outer_whitespace_keep_their_end_of_turn(name, turns):
    encoded = encode(chat(*turns), name)
    end_id = TOKENIZER.convert_tokens_to_ids(END_OF_TURN[name])
    assert encoded.labels.count(end_id) == len(turns) // 2
    assert all(label in (-100, token) for label, token in zip(encoded.labels, encoded.input_ids, strict=True))


@settings(max_examples=60, deadline=None)
@given(turns=conversations)
def test_marked_template_agrees_with_transformers(turns):
    encoded = encode(chat(*turns), "chatml_marked")
    reference = TOKENIZER.apply_chat_template(
        chat(*turns)["messages"],
        chat_template=template("chatml_marked"),
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    assert encoded.input_ids == reference["input_ids"]
    assert [int(label != -100) for label in encoded.labels] == reference["assistant_masks"]


@settings(max_examples=60, deadline=None)
@given(turns=conversations)
def test_derived_and_marked_templates_agree(turns):
    derived = encode(chat(*turns), "chatml")
    assert derived == encode(chat(*turns), "chatml_marked") == encode(chat(*turns), "chatml_marked_open")


def test_padding_token_that_ends_turns_carries_loss():
    tokenizer = make_tokenizer(eos_token="<|im_end|>", pad_token="<|im_end|>")
    (encoded,) = build_renderer(tokenizer, "messages", True, template("chatml")).encode([chat("q", "a")])
    assert learned(encoded, tokenizer) == "a<|im_end|>"


def test_answer_that_writes_a_special_token_is_learned_whole():
    assert learned(encode(chat("q", "a<|im_end|>b"), "chatml")) == "a<|im_end|>b<|im_end|>"


def test_system_message_and_questions_carry_no_loss():
    assert learned(encode(chat("q", "a", "trailing question", system="s"), "llama3")) == "a<|eot_id|>"


@each_template
def test_an_answer_without_loss_has_none_and_the_others_keep_theirs(name):
    encoded = encode({**chat("one?", "first", "two?", "second"), "without_loss": [0]}, name)
    assert "first" in encoded.text and "first" not in learned(encoded)
    assert learned(encoded).strip().startswith("second") and END_OF_TURN[name] in learned(encoded)


def test_an_answer_without_loss_is_refused_where_it_cannot_be_told():
    example = {**chat("one?", "first", "two?", "second"), "without_loss": [0]}
    (refused,) = build_renderer(TOKENIZER, "messages", False, template("chatml")).encode([example])
    assert "completion_only_loss: false" in refused.reason
    once = "{% generation %}" + template("chatml") + "{% endgeneration %}"
    (refused,) = build_renderer(TOKENIZER, "messages", True, once).encode([example])
    assert "marks 1 ranges for 2 answers" in refused.reason


@pytest.mark.parametrize("name", ["chatml", "chatml_marked"])
def test_the_template_is_told_of_the_tools_and_they_carry_no_loss(name):
    source = "{% for tool in tools %}{{ tool.name }}() {% endfor %}" + template(name)
    (encoded,) = build_renderer(TOKENIZER, "messages", True, source).encode(
        [{**chat("one?", "first"), "tools": [{"name": "find"}]}]
    )
    assert encoded.text.startswith("find() ") and learned(encoded).strip().startswith("first")


def test_loss_on_every_token_when_asked_for():
    encoded = encode(chat("q", "a"), "chatml", only=False)
    assert encoded.labels == encoded.input_ids


def test_template_that_adds_text_to_the_last_answer_only_is_followed():
    source = (
        template("chatml")
        .replace("+ message['content']", "+ extra + message['content']")
        .replace(
            "-%}\n{{ '<|im_start|>' + m",
            "-%}\n{%- set extra = '<think></think>' if loop.last and message.role == 'assistant' else '' -%}\n"
            "{{ '<|im_start|>' + m",
        )
    )
    (encoded,) = build_renderer(TOKENIZER, "messages", True, source).encode([chat("q", "a", "r", "think")])
    assert learned(encoded) == "a<|im_end|><think></think>think<|im_end|>"


@pytest.mark.parametrize(
    ("name", "example", "message"),
    [
        ("gemma", chat("q", "a", system="s"), "System role not supported"),
        ("gemma", {"messages": chat("q", "a")["messages"][1:]}, "Roles must alternate user/assistant"),
        ("mistral", {"messages": chat("q", "a")["messages"] * 2 + chat("a", "b")["messages"][1:]}, "must alternate"),
        ("chatml", {"messages": chat("q")["messages"]}, "no assistant turn"),
        ("chatml", {"messages": [{"role": "assistant", "content": None}]}, "refuses the conversation"),
    ],
)
def test_refused_conversation_names_the_reason_and_leaves_the_others(name, example, message):
    good = chat("q", "a")
    before, problem, after = build_renderer(TOKENIZER, "messages", True, template(name)).encode([good, example, good])
    assert isinstance(problem, RenderProblem)
    assert message in problem.reason
    assert isinstance(before, Encoded)
    assert before == after


def test_conversation_that_cannot_be_verified_is_a_problem():
    # The answer is written in capitals: what is learned would not be what the data say.
    source = template("chatml").replace(
        "+ message['content']", "+ (message['content'] | upper if 'x' in message['content'] else message['content'])"
    )
    good, bad = build_renderer(TOKENIZER, "sharegpt", True, source).encode([chat("q", "a"), chat("q", "x")])
    assert isinstance(good, Encoded)
    assert isinstance(bad, RenderProblem)
    assert "message 2" in bad.reason


def test_every_token_that_closes_an_answer_is_learned_and_none_of_the_next_turn():
    source = (
        "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + '<|end|></s>' }}{% endfor %}"
        "{{ '<|assistant|>' if add_generation_prompt }}"
    )
    (encoded,) = build_renderer(TOKENIZER, "messages", True, source).encode([chat("q", "a", "r", "b")])
    assert learned(encoded) == "a<|end|></s>b<|end|></s>"


def test_prompt_that_opens_a_thought_does_not_hide_an_answer_without_one():
    source = template("chatml").replace("assistant\\n'", "assistant\\n<think>\\n'")
    renderer = build_renderer(TOKENIZER, "messages", True, source)
    (encoded,) = renderer.encode([chat("q", "a", "r", "b")])
    assert learned(encoded) == "a<|im_end|>b<|im_end|>"


def test_thought_that_the_history_drops_is_a_problem_even_when_the_answer_recurs():
    source = template("chatml").replace(
        "+ message['content']", "+ (message['content'] if loop.last else message['content'].split('</think>')[-1])"
    )
    thought = "<think>r</think>a"
    (problem,) = build_renderer(TOKENIZER, "messages", True, source).encode([chat("q", thought, "q", thought)])
    assert isinstance(problem, RenderProblem)


def test_answer_that_only_a_later_question_repeats_is_a_problem():
    source = template("chatml").replace(
        "+ message['content']",
        "+ (message['content'] | upper if loop.index == 2 and messages[0].content == 'loud' else message['content'])",
    )
    renderer = build_renderer(TOKENIZER, "messages", True, source)
    (problem,) = renderer.encode([chat("loud", "x", "x")])
    assert isinstance(problem, RenderProblem)


def test_answer_that_only_the_next_turn_closes_is_a_problem():
    # Every turn but the probe's is closed by the opening token of the next one.
    source = (
        "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content }}"
        "{{ '<|end|>' if messages[0].content.endswith('?') }}{% endfor %}{{ '<|assistant|>' if add_generation_prompt }}"
    )
    renderer = build_renderer(TOKENIZER, "messages", True, source)
    good, bad = renderer.encode([chat("q?", "a", "r"), chat("q", "a", "r")])
    assert isinstance(good, Encoded)
    assert learned(good) == "a<|end|>"
    assert isinstance(bad, RenderProblem)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}", "end-of-turn"),
        ("{{ messages | length }}{% for m in messages %}{{ m.content + '</s>' }}{% endfor %}", "renders the messages"),
        ("{{ raise_exception('never') }}", "never"),
        ("{% if %}", "no Jinja that can be compiled"),
        ("{% generation %}{% endgeneration %}".join(["{% if false %}", "{% endif %}x"]), "marks nothing"),
    ],
)
def test_template_without_a_recognisable_answer_is_refused_with_a_hint(source, reason):
    with pytest.raises(DataError, match=reason) as caught:
        build_renderer(TOKENIZER, "messages", True, source)
    assert "chat_template: file.jinja" in str(caught.value)


def test_conversations_without_a_chat_template_are_refused_with_a_hint():
    with pytest.raises(DataError, match=r"chat_template: file\.jinja"):
        build_renderer(TOKENIZER, "messages", True)


def test_own_template_of_the_tokenizer_is_used():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template("chatml")
    renderer = build_renderer(tokenizer, "messages", True)
    assert renderer.encode([chat("q", "a")]) == [encode(chat("q", "a"), "chatml")]


@settings(max_examples=60, deadline=None)
@given(prompt=contents, completion=contents)
def test_completion_and_its_end_carry_the_loss_and_the_prompt_none(prompt, completion):
    prompt, completion = f"{prompt}:", f"<{completion}>"
    (encoded,) = build_renderer(TOKENIZER, "prompt-completion", True).encode(
        [{"prompt": prompt + " ", "completion": completion}]
    )
    assert encoded.text == f"{prompt} {completion}</s>" == TOKENIZER.decode(encoded.input_ids)
    assert learned(encoded).removeprefix(" ") == completion + "</s>"


@pytest.mark.parametrize(
    ("format", "only", "example"),
    [("text", True, {"text": "once"}), ("prompt-completion", False, {"prompt": "on", "completion": "ce"})],
)
def test_every_token_of_a_text_and_its_end_carries_loss(format, only, example):
    renderer = build_renderer(TOKENIZER, format, only)
    (encoded,) = renderer.encode([example])
    assert renderer.mask_source == "all-tokens"
    assert encoded.labels == encoded.input_ids
    assert encoded.text == "once</s>"


def test_end_that_stands_there_already_is_not_doubled():
    (encoded,) = build_renderer(TOKENIZER, "text", True).encode([{"text": "once</s>"}])
    assert encoded.text == "once</s>"


@pytest.mark.parametrize(
    ("name", "source"),
    [("chatml", "derived"), ("chatml_marked", "generation-markers"), ("chatml_marked_open", "generation-markers")],
)
def test_mask_source_says_where_the_spans_come_from(name, source):
    assert build_renderer(TOKENIZER, "messages", True, template(name)).mask_source == source
    assert build_renderer(TOKENIZER, "messages", False, template(name)).mask_source == "all-tokens"
    assert build_renderer(TOKENIZER, "prompt-completion", True).mask_source == "boundary"


def with_bos() -> PreTrainedTokenizerFast:
    tokenizer = make_tokenizer()
    bos_id = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", bos_id)]
    )
    return tokenizer


def test_first_token_that_the_tokenizer_adds_stands_before_texts_and_prompts_once():
    tokenizer = with_bos()
    text, written = build_renderer(tokenizer, "text", True).encode([{"text": "once"}, {"text": "<s>once"}])
    assert text == written
    assert text.text == "<s>once</s>" == tokenizer.decode(text.input_ids)
    assert text.labels == text.input_ids == tokenizer("once</s>")["input_ids"]
    (pair,) = build_renderer(tokenizer, "prompt-completion", True).encode([{"prompt": "q:", "completion": "a"}])
    assert pair.text == "<s>q:a</s>" == tokenizer.decode(pair.input_ids)
    assert learned(pair, tokenizer) == "a</s>"


def test_first_token_of_a_conversation_is_left_to_the_template():
    tokenizer = with_bos()
    for name, count in (("llama3", 1), ("chatml", 0)):
        (encoded,) = build_renderer(tokenizer, "messages", True, template(name)).encode([chat("q", "a")])
        assert encoded.input_ids.count(tokenizer.bos_token_id) == count


def test_empty_example_without_an_end_token_is_a_problem():
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    empty, full = build_renderer(tokenizer, "prompt-completion", True).encode(
        [{"prompt": "q", "completion": ""}, {"prompt": "q:", "completion": "a"}]
    )
    assert empty == RenderProblem("no token of the example carries loss")
    assert learned(full, tokenizer) == "a"


def test_slow_tokenizer_is_refused_with_a_hint():
    with pytest.raises(DataError, match="slow tokenizer"):
        build_renderer(ByT5Tokenizer(), "text", True)


def test_no_example_gives_no_result():
    assert build_renderer(TOKENIZER, "text", True).encode([]) == []


def test_whitespace_after_the_end_of_turn_inside_markers_is_cut():
    assert SpecialTokens(["<e>", "<s>"]).close("ab<e>\n<s>", (1, 6)) == (1, 5)


def test_span_without_a_special_token_near_stays():
    assert SpecialTokens([""]).close("abc", (1, 2)) == (1, 2)


def test_bytes_of_one_character_share_its_label():
    assert range_by_offsets([(0, 1), (1, 2), (1, 2), (2, 3)], (1, 2)) == (1, 3)
