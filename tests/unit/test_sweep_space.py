"""What a search says, what of it is refused, and what is searched when nothing is said."""

from __future__ import annotations

import pytest

from example_run import choices
from laras.cli.sweep import parse_time
from laras.config import RunConfig
from laras.config_file import load_config
from laras.errors import ConfigError, ExitCode
from laras.sweep_record import SweepParameter
from laras.sweeping.space import (
    SEARCHABLE,
    as_configured,
    combinations,
    contains,
    default_space,
    describe,
    parse_search,
    with_values,
)

CONFIG = load_config(None, {"model_name_or_path": "m", "dataset": "d.jsonl"})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("learning_rate=1e-5..1e-3:log", {"kind": "float", "low": 1e-5, "high": 1e-3, "log": True}),
        ("lr = 0.0001 .. 0.001 : log", {"kind": "float", "low": 1e-4, "high": 1e-3, "log": True}),
        ("weight-decay=0.0..0.1", {"kind": "float", "low": 0.0, "high": 0.1}),
        ("num_train_epochs=1..4", {"kind": "int", "low": 1, "high": 4}),
        ("epochs=1.0..4.0", {"kind": "float", "low": 1.0, "high": 4.0}),
        ("lora_r=8.0..64.0:log", {"kind": "int", "low": 8, "high": 64, "log": True}),
        ("lora_r=8,16, 32", {"kind": "choice", "choices": (8, 16, 32)}),
        ("use_rslora=true,false", {"kind": "choice", "choices": (True, False)}),
        ("learning_rate=1e-4,auto", {"kind": "choice", "choices": (1e-4, "auto")}),
        ("lr_scheduler_type=cosine,linear", {"kind": "choice", "choices": ("cosine", "linear")}),
    ],
)
def test_a_search_is_a_range_or_choices(text: str, expected: dict[str, object]) -> None:
    (parameter,) = parse_search([text], CONFIG)
    assert parameter == SweepParameter(name=parameter.name, **expected)
    assert parse_search([describe(parameter)], CONFIG) == (parameter,)


def test_a_mapping_says_the_same() -> None:
    written = parse_search(["learning_rate=1e-5..1e-3:log", "lora_r=8,16"], CONFIG)
    assert parse_search({"learning_rate": "1e-5..1e-3:log", "lora_r": [8, 16]}, CONFIG) == written


def test_every_problem_comes_at_once_in_the_words_of_the_configuration() -> None:
    wrong = {
        "lerning_rate=1e-5..1e-3": "did you mean 'learning_rate'",
        "lora_r=0..8": "lora_r: input should be 'auto', or input should be greater than or equal to 1",
        "lr_scheduler_type=cosine,cosin": "lr_scheduler_type: input should be 'cosine'",
        "weight_decay=0..0.1:log": "weight_decay: a logarithmic range must begin above 0",
        "learning_rate=1e-3..1e-5": "learning_rate: the range '1e-3..1e-5' is empty",
        "warmup_ratio=a..b": "warmup_ratio: the ends of 'a..b' must be numbers",
        "max_grad_norm=1..2:lin": "max_grad_norm: '1..2:lin' is not LOW..HIGH",
        "use_dora=0..1": "use_dora: takes no numbers",
        "lora_dropout=0.1": "lora_dropout: one value is no choice",
        "lora_alpha=8,8": "lora_alpha: a choice is given twice",
        "seed=1,2": "seed: not searched, as it changes the data",
        "wandb_project=a,b": "wandb_project: not a key of Laras",
        "optim": "'optim': not NAME=VALUES",
    }
    with pytest.raises(ConfigError) as caught:
        parse_search(list(wrong), CONFIG)
    assert caught.value.exit_code == ExitCode.USAGE
    assert "--search learning_rate=" in str(caught.value.hint)
    assert len(caught.value.problems) == len(wrong)
    for text in wrong.values():
        assert any(text in problem for problem in caught.value.problems), (text, caught.value.problems)


def test_a_key_searched_twice_is_refused_under_any_of_its_names() -> None:
    with pytest.raises(ConfigError, match="learning_rate: searched twice"):
        parse_search(["lr=1e-5..1e-3", "learning_rate=1e-4,1e-3"], CONFIG)


def test_values_that_do_not_go_together_are_named_before_anything_runs() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_search(["finetuning_type=lora,full", "use_dora=true,false"], CONFIG)
    (problem,) = caught.value.problems
    assert problem.startswith("finetuning_type=full use_dora=true: use_dora is a kind of LoRA")


def test_what_is_searched_changes_neither_the_rows_nor_the_score() -> None:
    assert set(SEARCHABLE) <= set(RunConfig.model_fields)
    same_data = {"dataset", "split", "seed", "limit", "max_length", "overlong", "completion_only_loss", "columns"}
    same_data |= {"model_name_or_path", "chat_template", "early_stopping_patience", "early_stopping_min_delta"}
    assert not same_data & set(SEARCHABLE)


def test_unasked_it_is_a_decade_of_the_planned_rate_either_way_and_ranks_around_the_planned_one() -> None:
    planned = choices(learning_rate=2e-4, lora_r=12)
    rate, rank = default_space(CONFIG, planned)
    assert (rate.name, rate.log) == ("learning_rate", True)
    assert (rate.low, rate.high) == (pytest.approx(2e-5), pytest.approx(2e-3))
    assert rank.choices == (8, 12, 16, 32, 64)
    assert as_configured(CONFIG, planned, (rate, rank)) == {"learning_rate": 2e-4, "lora_r": 12}
    (only,) = default_space(with_values(CONFIG, {"finetuning_type": "full"}), planned)
    assert only.name == "learning_rate"


def test_the_configuration_is_a_trial_only_where_it_lies_in_the_space() -> None:
    space = parse_search(["learning_rate=1e-3..1e-2", "lora_r=auto,8"], CONFIG)
    assert as_configured(CONFIG, choices(learning_rate=2e-4), space) is None
    assert as_configured(CONFIG, choices(learning_rate=2e-3), space) == {"learning_rate": 2e-3, "lora_r": "auto"}


def test_a_space_knows_what_it_holds() -> None:
    space = parse_search(["num_train_epochs=1..4", "use_rslora=true,false"], CONFIG)
    assert combinations(space) == 8
    assert combinations(parse_search(["learning_rate=1e-5..1e-3"], CONFIG)) is None
    epochs, rslora = space
    assert contains(epochs, 3) and contains(epochs, 3.0)
    assert not any(contains(epochs, value) for value in (0, 5, 2.5, True, "3"))
    assert contains(rslora, True) and not contains(rslora, 1)


@pytest.mark.parametrize(
    ("text", "seconds"), [("45s", 45), ("30m", 1800), ("2h", 7200), ("1h30m", 5400), ("1 h 5 min", 3900), ("90", 90)]
)
def test_a_time_limit_is_read_as_written(text: str, seconds: float) -> None:
    assert parse_time(text) == seconds


@pytest.mark.parametrize("text", ["soon", "2 weeks", "h", "1h30", ""])
def test_what_is_no_duration_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="is no duration"):
        parse_time(text)
