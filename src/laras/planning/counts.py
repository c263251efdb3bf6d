"""Parameters of architectures without a table: counted on the built model, and remembered."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass

from laras.config import RunConfig
from laras.errors import LarasError
from laras.planning.architecture import FAMILIES
from laras.planning.remembered import remembered
from laras.records import ModelSpec


@dataclass(frozen=True)
class ParameterCounts:
    """Counts of a model.

    Attributes:
        total: All, tied ones once.
        linear: Matrices of the decoder, those of experts included.
        embedding: Embeddings, and the head where it is not tied.
    """

    total: int
    linear: int
    embedding: int


def with_counts(spec: ModelSpec, config: RunConfig, count: Callable[[RunConfig], ParameterCounts]) -> ModelSpec:
    """The architecture with the counts of the model itself, where its family has no table; else, or where the model
    cannot be built, as it is.

    Args:
        spec: As read from `config.json`.
        config: Names the model.
        count: `laras.models.parameters.count_parameters`; the pipeline hands it in.
    """
    if spec.model_type in FAMILIES:
        return spec
    try:
        found = remembered(
            "counts", {"model": spec.config_digest}, lambda: count(config),
            read=lambda values: ParameterCounts(**values), written=asdict,
        )  # fmt: skip
    except LarasError:
        return spec
    return spec.model_copy(
        update={
            "total_parameters": found.total,
            "linear_parameters": found.linear,
            "embedding_parameters": found.embedding,
            "is_counted": True,
        }
    )
