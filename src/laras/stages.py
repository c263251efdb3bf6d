"""The stages before there is a run: tokenizer, data and plan. Each loads its libraries when it begins."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from laras.config import RunConfig
from laras.errors import ConfigError, PlanError
from laras.formatting import size
from laras.progress import Observer
from laras.records import SplitManifest, TrainPlan

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from laras.data.prepare import PreparedData


def import_backend(config: RunConfig, observer: Observer) -> str | None:
    """Imports what has to come before torch; see `laras.models.unsloth.import_for_config`."""
    from laras.models.unsloth import import_for_config

    return import_for_config(config, lambda: load_spec(config), observer)


def load_tokenizer_of(config: RunConfig, observer: Observer) -> PreTrainedTokenizerBase:
    """The tokenizer that the configuration names.

    Raises:
        ConfigError: It cannot be loaded.
    """
    from laras.models import cold_start

    observer.stage_started("loading the tokenizer")
    cold_start.load("laras.models.loader")
    from laras.models.loader import load_tokenizer

    return load_tokenizer(
        config.model_name_or_path,
        revision=config.model_revision,
        trust_remote_code=config.trust_remote_code,
        chat_template=config.chat_template,
    )


def prepare(config: RunConfig, tokenizer: PreTrainedTokenizerBase, observer: Observer) -> PreparedData:
    """Data that is read, checked, tokenised and divided, from the cache where it was made before.

    Raises:
        DataError: With every problem of the data at once.
        ConfigError: The tokenizer makes ids that the model has no embedding for.
    """
    from laras.data.prepare import prepare_dataset
    from laras.data.store import largest_id

    spec = load_spec(config)
    prepared = prepare_dataset(config, tokenizer, spec.max_position_embeddings, observer)
    largest = max(largest_id(rows) for rows in (prepared.train, prepared.validation, prepared.test))
    if largest >= spec.vocab_size:
        raise ConfigError(
            f"the tokenizer writes token {largest} ({tokenizer.convert_ids_to_tokens(largest)!r}), and the model of "
            f"model_name_or_path {config.model_name_or_path!r} has embeddings for {spec.vocab_size} tokens",
            hint="take the tokenizer that belongs to the model, or save the model with its embeddings resized",
        )
    return prepared


def require_device(config: RunConfig) -> None:
    """Refuses to train what would be planned for a card of the catalogue on a machine without any.

    Raises:
        ConfigError: `gpu` names a card, and there is none; or the catalogue has none of that name.
    """
    from laras.planning.hardware import load_hardware

    if config.gpu is None:
        return
    wanted = load_hardware(config.gpu)
    if wanted.kind == "cuda" and load_hardware(None).kind != "cuda":
        raise ConfigError(
            f"the plan would be for {wanted.gpu_name}, as `gpu` says, and this machine has no GPU",
            hint="leave `gpu` to `laras plan`; training is then planned for what is here",
        )


def require_test_part(config: RunConfig) -> None:
    """Refuses to promise a score where the configuration leaves nothing to be sealed for it; reads no row.

    Raises:
        ConfigError: `split.test` is 0, and no source is given for the test.
        DataError: The sources cannot be found.
    """
    from laras.data.sources import find_sources

    if config.split.test == 0 and not any(source.part == "test" for source in find_sources(config.dataset)):
        raise _no_test_rows(config)


def require_test_rows(config: RunConfig, manifest: SplitManifest) -> None:
    """Refuses to promise a score that no row was sealed for, as where all those of a test file are bad.

    Raises:
        ConfigError: The test set is empty.
    """
    if manifest.test.rows == 0:
        raise _no_test_rows(config)


def _no_test_rows(config: RunConfig) -> ConfigError:
    return ConfigError(
        f"--test scores the sealed test set, and it would hold 0 rows: split.test is {config.split.test}; at least 1 "
        "row is needed",
        hint="set split.test, say to 0.1, name a file in `dataset: {test: …}`, or leave --test out",
    )


def division(manifest: SplitManifest) -> str:
    """How the rows were divided, in one line."""
    rows = manifest.train.rows, manifest.validation.rows, manifest.test.rows
    return (
        f"{sum(rows):,} examples: {rows[0]:,} to learn from, {rows[1]:,} to validate, {rows[2]:,} sealed for the test"
    )


def make_plan(
    config: RunConfig, prepared: PreparedData | None, observer: Observer, import_failure: str | None = None
) -> TrainPlan:
    """The plan for this machine's device or the one that `config.gpu` names; `prepared` is None without data.

    Raises:
        ConfigError: The model's configuration cannot be loaded, or nothing can train it so.
    """
    from laras.models.cold_start import trace_step
    from laras.planning.counts import with_counts
    from laras.planning.hardware import load_hardware
    from laras.planning.planner import plan_training

    observer.stage_started("planning")
    spec = load_spec(config).model_copy(update={"source": config.model_name_or_path})
    spec = with_counts(spec, config, _count_parameters)
    profile, manifest = (prepared.profile, prepared.manifest) if prepared else (None, None)
    return plan_training(config, profile, manifest, spec, load_hardware(config.gpu), trace_step, import_failure)


def require_fit(chosen: TrainPlan) -> None:
    """Refuses a plan that does not fit.

    Raises:
        PlanError: With what would make it possible.
    """
    if not chosen.fits:
        raise PlanError(
            f"the plan does not fit {chosen.hardware.gpu_name}: it needs "
            f"{size(chosen.memory.train_peak_reserved_bytes)} of {size(chosen.memory.device_budget_bytes)}",
            problems=chosen.remedies,
            hint="each line above would make it possible; `laras plan` shows the whole plan",
        )


def load_spec(config: RunConfig) -> Any:
    """The architecture of the model, from its `config.json`.

    Raises:
        ConfigError: There is none, or it is no causal language model's.
    """
    from laras.models.builtin import resolve_tokenizer
    from laras.planning.architecture import load_model_spec

    return load_model_spec(resolve_tokenizer(config.model_name_or_path), revision=config.model_revision)


def _count_parameters(config: RunConfig) -> Any:
    """`laras.models.parameters.count_parameters`, loaded for a family without a table only: it brings torch."""
    from laras.models.parameters import count_parameters

    return count_parameters(config)
