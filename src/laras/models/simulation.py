"""The memory of a training step, from the step itself: run on meta tensors, without weights and without a GPU.

The model that training would build is built at a few layers on the meta device, goes forward and backward through the
very step function, and is evaluated once; what it requests is recorded (`laras.models.recording`) and unrolled to full
depth (`laras.planning.trace`). No constant is fitted to an architecture.

Source: checked against an H100, see benchmarks/results/memory.md.
"""

from __future__ import annotations

import copy
import json
import logging
import tempfile
import warnings
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from laras.config import RunConfig
from laras.errors import LarasError
from laras.models.builtin import resolve_tokenizer
from laras.models.emulation import autocast_like_cuda, counted_kernels, kernels_of, record_optimizer, record_states
from laras.models.layer_kinds import DEPTH_NAMES, decoder_layers, kinds_of_layers
from laras.models.quantized_meta import quantized_storages, quantizing_bytes
from laras.models.recording import LongLayer, Recorder, register_varlen
from laras.planning.depth import Repeat, find_repeat
from laras.planning.trace import StepTrace
from laras.planning.workload import LargestBatch
from laras.progress import Observer
from laras.records import HardwareSpec, PlanChoices

_SHORT_ROWS = range(64, 31, -2)  # tokens of rows that stand for longer ones of layers that loop over positions


class NotSimulated(LarasError):
    """A model that cannot be run on meta tensors: its own code, or an operation without shapes."""


def trace_step(
    config: RunConfig,
    choices: PlanChoices,
    layers: int,
    hardware: HardwareSpec,
    documents: int | None = None,
    largest: LargestBatch | None = None,
) -> StepTrace:
    """Records one optimizer step and one evaluation batch.

    Args:
        config: What the user wants; names the model.
        choices: What is planned, resolved.
        layers: Depth of the model.
        hardware: The device planned for; decides which kernels would run.
        documents: Most documents of a packed batch; None: as many as have `max_length` tokens.
        largest: What the data can make at most; None: rows of `max_length`, every token a target.

    Returns:
        A trace that `unroll(layers)` accepts: recorded at a few layers where they repeat, else at all; and in short
        rows where its layers loop over positions.

    Raises:
        NotSimulated: The model cannot be built or run on meta tensors.
    """
    largest = largest or LargestBatch(choices.packed_tokens or choices.max_length, None, choices.max_length)

    def record(choices: PlanChoices, largest: LargestBatch, *, ends_early: bool) -> StepTrace:
        if repeat is not None:
            trace = _record(config, choices, layers, hardware, documents, largest, repeat, ends_early=ends_early)
            if trace.why_not_repeated() is None:
                return trace
        return _record(config, choices, layers, hardware, documents, largest, ends_early=ends_early)

    try:
        repeat = _repeat(config, layers)
        try:
            return record(choices, largest, ends_early=not choices.packing and not choices.fused_layers)
        except LongLayer:
            return _in_short_rows(record, choices, largest) or record(choices, largest, ends_early=False)
    except LarasError:
        raise
    except Exception as error:  # a model's own code can raise anything
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise NotSimulated(
            f"{config.model_name_or_path} cannot be simulated: {reason}", hint="the closed form is used instead"
        ) from error


def _record(
    config: RunConfig,
    choices: PlanChoices,
    layers: int,
    hardware: HardwareSpec,
    documents: int | None,
    largest: LargestBatch,
    repeat: Repeat | None = None,
    *,
    ends_early: bool,
) -> StepTrace:
    from laras.models.step import eager_step, path_of, target_losses

    kept = repeat.kept(layers) if repeat else range(layers)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of a cast at every product
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = _build(_shallow(config, Path(folder), kept), choices)
    blocks = decoder_layers(model, len(kept))
    if not blocks:
        raise NotSimulated(
            f"{config.model_name_or_path} cannot be simulated: it has no list of {layers} layers",
            hint="the closed form is used instead",
        )
    owner = {id(part): number for number, block in enumerate(blocks) for part in block.modules()}
    recorder = Recorder(blocks, ends_early=ends_early)
    _record_static(recorder, model, owner)
    trained = _trained(model, owner)
    fused = path_of(model).fused
    if choices.packing and fused is None:
        register_varlen()
    paged = record_states(recorder, trained, choices.optim)
    step = eager_step(model)
    with ExitStack() as stack:
        stack.enter_context(kernels_of(hardware, recorder))
        if fused is not None:
            stack.enter_context(_watched(fused, recorder))
            stack.enter_context(counted_kernels(recorder))
        elif choices.precision != "fp32":
            stack.enter_context(autocast_like_cuda(choices.precision))  # as the trainer runs transformers' layers
        stack.enter_context(recorder)
        for index in range(min(2, choices.gradient_accumulation_steps)):
            recorder.begin("batch", index)
            batch = _training_batch(choices, largest, documents)
            recorder.watch("forward", "loss", "backward", index)
            loss = step(batch, torch.empty((), device="meta"))
            recorder.stop_watching()
            recorder.begin("end", index)
            del loss, batch
        record_optimizer(recorder, trained, choices.optim, hardware)
        recorder.begin("release")
        for _, parameter in trained:
            parameter.grad = None
        model.eval()
        recorder.begin("evaluation", 0)
        recorder.watch("evaluation", "evaluation", None, 1)
        with torch.no_grad():
            losses = target_losses(model, _rows(choices.per_device_eval_batch_size, largest.eval_row_tokens))
            recorder.stop_watching()
            recorder.begin("evaluation", 2)
            del losses
    return recorder.trace(paged, repeat)


def _in_short_rows(record: Callable[..., StepTrace], choices: PlanChoices, largest: LargestBatch) -> StepTrace | None:
    """The step of layers that loop over positions, from one of as many tokens in more and shorter rows.

    It holds the same bytes but for the states of a few positions, which are more; calls and traffic are affine in the
    length of a row, and are extrapolated from two lengths. None where the layers do more than loop: masks of attention
    are not affine, chunks would be padded, and a loop over experts gets no shorter.
    """
    if min(largest.row_tokens, largest.eval_row_tokens) < 2 * _SHORT_ROWS[0]:
        return None
    tokens, eval_tokens = (
        min(_SHORT_ROWS, key=lambda short: -row % short)  # which leaves the fewest tokens over
        for row in (largest.row_tokens, largest.eval_row_tokens)
    )
    parts, eval_parts = -(-largest.row_tokens // tokens), -(-largest.eval_row_tokens // eval_tokens)

    def in_rows_of(share: int) -> StepTrace:
        rows = {
            "per_device_train_batch_size": choices.per_device_train_batch_size * parts * share,
            "per_device_eval_batch_size": choices.per_device_eval_batch_size * eval_parts * share,
        }
        shorter = replace(largest, row_tokens=tokens // share, eval_row_tokens=eval_tokens // share)
        return record(choices.model_copy(update=rows), shorter, ends_early=True)

    try:
        fewer = in_rows_of(2)
        if any(part.work.attention for part in fewer.segments):
            return None
        more = in_rows_of(1)
    except LongLayer:
        return None
    if [part.key for part in fewer.segments] != [part.key for part in more.segments]:
        return None
    segments = []
    for one, other in zip(fewer.segments, more.segments, strict=True):
        if one.work.product_operations != other.work.product_operations:
            return None
        halves = 2 * ((eval_parts if other.kind == "evaluation" else parts) - 1)
        segments.append(replace(other, work=other.work.continued(one.work, halves)))
    return replace(more, segments=tuple(segments))


@contextmanager
def _watched(fused: Any, recorder: Recorder) -> Iterator[None]:
    """Fused layers are no modules: their calls are told to the recorder here."""
    original = fused.layers
    last = len(original) - 1

    def watched(number: int, layer: Any) -> Any:
        def call(hidden: Tensor, documents: Any) -> Tensor:
            recorder.entered(number)
            output: Tensor = layer(hidden, documents)
            recorder.left(number, output, is_last=number == last)
            return output

        return call

    def refresh(*, always: bool = False) -> None:
        index = recorder.place[1]
        for number, layer in enumerate(original):
            for group in layer.groups:
                recorder.begin("batch", index, number)
                group.refresh(always=always)
        recorder.begin("batch", index)

    fused.layers = [watched(number, layer) for number, layer in enumerate(original)]
    fused.refresh = refresh
    try:
        yield
    finally:
        fused.layers = original
        del fused.refresh


# ------------------------------------------------------------ the model


def _repeat(config: RunConfig, layers: int) -> Repeat | None:
    """The layers that stand for more; None where a shallower model would not have the kinds that the whole one has."""
    kinds = _kinds(config, range(layers))
    repeat = find_repeat(kinds)
    if repeat is None:
        return None
    kept = repeat.kept(layers)
    with suppress(Exception):  # a configuration may allow its own depth only
        if _kinds(config, kept) == tuple(kinds[layer] for layer in kept):
            return repeat
    return None


def _kinds(config: RunConfig, kept: Sequence[int]) -> tuple[Hashable, ...]:
    """Of the layers of the model that has only these."""
    from laras.models.build import bare_model

    with tempfile.TemporaryDirectory() as folder:
        return kinds_of_layers(bare_model(_shallow(config, Path(folder), kept)), len(kept))


def _shallow(config: RunConfig, folder: Path, kept: Sequence[int]) -> RunConfig:
    """The same for a model of some of the layers; its folder gets a `config.json` and nothing else."""
    from laras.planning.architecture import read_model_config

    source = resolve_tokenizer(config.model_name_or_path)
    values: dict[str, Any] = copy.deepcopy(dict(read_model_config(source, revision=config.model_revision)))
    nested = values.get("text_config")
    text: dict[str, Any] = nested if isinstance(nested, dict) else values
    deep = next((text[key] for key in DEPTH_NAMES if isinstance(text.get(key), int)), len(kept))
    for key in DEPTH_NAMES:
        if key in text:
            text[key] = len(kept)
    for key, value in list(text.items()):
        if isinstance(value, list) and len(value) == deep:
            text[key] = [value[layer] for layer in kept]
        elif isinstance(value, dict) and value and all(str(name).isdigit() and int(name) < deep for name in value):
            numbers = {layer: number for number, layer in enumerate(kept)}
            text[key] = {str(numbers[int(name)]): item for name, item in value.items() if int(name) in numbers}
    values.pop("quantization_config", None)
    (folder / "config.json").write_text(json.dumps(values), encoding="utf-8")
    return config.model_copy(update={"model_name_or_path": str(folder), "model_revision": None})


def _build(config: RunConfig, choices: PlanChoices) -> Any:
    from laras.models.build import build_model

    return build_model(config, choices, "meta", Observer())


def _trained(model: nn.Module, owner: Mapping[int, int]) -> list[tuple[int, nn.Parameter]]:
    """Trainable parameters with the layer that owns each; a tied one counts once."""
    seen: dict[int, tuple[int, nn.Parameter]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if parameter.requires_grad:
                seen.setdefault(id(parameter), (owner.get(id(module), -1), parameter))
    return list(seen.values())


def _record_static(recorder: Recorder, model: nn.Module, owner: Mapping[int, int]) -> None:
    """What lives through the run, in the order in which building the model takes it.

    Fused layers copy their weights into storages of their own and give the loaded ones back, layer by layer; the order
    decides which holes the storages leave.
    """
    from laras.models.step import path_of

    fused = path_of(model).fused
    groups = [(number, group) for number, layer in enumerate(fused.layers if fused else ()) for group in layer.groups]
    moved = {id(group.storage.untyped_storage()) for _, group in groups if not group._is_quantized}
    loaded: dict[int, list[int]] = {}
    for module in model.modules():
        layer = owner.get(id(module), -1)
        recorder.begin("weights", 0, layer)
        passing = [recorder.request(size) for size in quantizing_bytes(module)]
        for parameter in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            recorder.begin("weights", 0, layer)
            if id(parameter.untyped_storage()) in moved:
                taken = recorder.request(parameter.numel() * parameter.element_size())
                loaded.setdefault(id(parameter.untyped_storage()), []).append(taken)
            else:
                recorder.track(parameter)
        for tensor in quantized_storages(module):
            recorder.begin("weights", 0, layer)
            recorder.track(tensor)
        for taken in passing:
            recorder.give_back(taken)
    shared = [group.storage.untyped_storage()._cdata for _, group in groups]
    for number, group in groups:
        is_shared = shared.count(group.storage.untyped_storage()._cdata) > 1
        for held in (group.storage, group.bias, getattr(group, "_factors", None)):
            if held is not None:
                recorder.begin("weights", 1, -1 if is_shared and held is group.storage else number)
                recorder.track(held)
        for taken in loaded.get(id(group.storage.untyped_storage()), ()):
            recorder.give_back(taken)


# ------------------------------------------------------------ batches


def _training_batch(choices: PlanChoices, largest: LargestBatch, documents: int | None) -> dict[str, Tensor]:
    """The largest of the plan, as its collator makes it."""
    rows = choices.per_device_train_batch_size
    if not choices.packing:
        batch = _rows(rows, largest.row_tokens)
        # Its collator names no targets: their number is in the data, which is not here.
        return batch if largest.target_tokens is None else {**batch, "target_positions": _ids(largest.target_tokens)}
    tokens = largest.row_tokens
    offsets = torch.empty((documents or rows) + 1, dtype=torch.int32, device="meta")
    places = _ids(tokens if largest.target_tokens is None else largest.target_tokens)
    packed = {name: _ids(1, tokens) for name in ("input_ids", "labels", "position_ids")}
    return {**packed, "cu_seqlens": offsets, "target_positions": places}


def _rows(rows: int, tokens: int) -> dict[str, Tensor]:
    return {name: _ids(rows, tokens) for name in ("input_ids", "labels", "attention_mask")}


def _ids(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.int64, device="meta")
