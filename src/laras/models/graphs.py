"""A training step captured once as a CUDA graph and replayed: one launch instead of thousands.

Only for batches of one fixed shape that say where their targets are (`laras.data.pack.PackCollator`), since a step that
waits for the GPU to learn a size cannot be captured. Everything else runs eagerly, and so does everything after a
capture that failed.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from laras.models.step import TrainStep, eager_step, path_of
from laras.progress import Observer
from laras.records import PlanChoices

_EAGER_STEPS = 2  # kernels are compiled and chosen in these


def train_step(model: nn.Module, choices: PlanChoices, observer: Observer) -> TrainStep:
    """The step of a model of `laras.models.build`: captured where the plan says so and layers are fused, else eager."""
    fused = path_of(model).fused
    if not choices.cuda_graph or fused is None:
        return eager_step(model)
    if fused.offloads:  # a replay would keep no order between its copies and those of steps around it
        observer.warning("the step is not captured as a CUDA graph: inputs of its layers go to main memory")
        return eager_step(model)
    if next(model.parameters()).device.type != "cuda":
        return eager_step(model)
    return GraphedStep(model, observer)


class GraphedStep:
    """A `TrainStep` that replays; its first calls are eager ones, and every call adds its gradients once.

    Args:
        model: With fused layers, on a GPU.
        observer: Is told when capturing fails.

    Attributes:
        rehearsals: See `laras.models.step.TrainStep`; the eager calls and the one that captures.
    """

    rehearsals = _EAGER_STEPS + 1

    def __init__(self, model: nn.Module, observer: Observer) -> None:
        self._model, self._observer = model, observer
        self._eager = eager_step(model)
        self._trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._gradients: list[Tensor] = []
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: dict[str, Tensor] = {}
        self._scale = torch.ones((), device=self._trained[0].device)
        self._loss = torch.zeros((), device=self._trained[0].device)
        self._side = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # one: each keeps the memory that it has used
        self._calls = 0
        self._gives_up = False

    @property
    def is_captured(self) -> bool:
        """Whether calls replay."""
        return self._graph is not None

    def __call__(self, batch: Mapping[str, Tensor], scale: Tensor) -> Tensor:
        """Forward and backward; see `laras.models.step.TrainStep`."""
        fused = path_of(self._model).fused
        if self._gives_up or "target_positions" not in batch or fused is None or fused.refusal() is not None:
            return self._eager(batch, scale)
        if self._calls < _EAGER_STEPS:
            self._calls += 1
            return self._on_side_stream(batch, scale)
        if self._graph is None:
            self._capture(batch)
        if self._graph is None or any(self._inputs[key].shape != value.shape for key, value in batch.items()):
            return self._eager(batch, scale)
        for key, value in batch.items():
            self._inputs[key].copy_(value, non_blocking=True)
        self._scale.copy_(scale, non_blocking=True)
        self._own_gradients()
        self._graph.replay()
        return self._loss.clone()

    def release(self) -> None:
        """Gives back what the graph keeps; later calls capture another one, of the shapes that come then."""
        self._graph, self._gradients, self._inputs, self._calls = None, [], {}, 0

    def _on_side_stream(self, batch: Mapping[str, Tensor], scale: Tensor) -> Tensor:
        """Gradients of a stream that was captured must not depend on work queued elsewhere."""
        self._side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._side):
            loss = self._eager(batch, scale)
        torch.cuda.current_stream().wait_stream(self._side)
        return loss

    def _capture(self, batch: Mapping[str, Tensor]) -> None:
        self._inputs = {key: value.clone() for key, value in batch.items()}
        self._gradients = [torch.zeros_like(parameter) for parameter in self._trained]
        self._own_gradients()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                loss = self._eager(self._inputs, self._scale)
                self._loss.copy_(loss)
        except Exception as error:  # noqa: BLE001 - whatever cannot be captured can still be run
            self._gives_up = True
            self._gradients = []
            first = str(error).strip().partition("\n")[0]
            self._observer.warning(f"the step is not captured as a CUDA graph and runs slower: {first}")
            return
        self._graph = graph

    def _own_gradients(self) -> None:
        """Puts the graph's own buffers in place of `.grad`, with what was there, or zeros."""
        fresh = []
        for parameter, buffer in zip(self._trained, self._gradients, strict=True):
            if parameter.grad is None:
                fresh.append(buffer)
            elif parameter.grad is not buffer:
                buffer.copy_(parameter.grad)
            parameter.grad = buffer
        if fresh:
            torch._foreach_zero_(fresh)
