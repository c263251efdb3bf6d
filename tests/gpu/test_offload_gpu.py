"""On a GPU inputs of layers come back from main memory as they left: the same bits as with all of them on the card."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import Qwen2Config

from laras.data.collate import PadCollator
from laras.data.pack import PackCollator
from laras.models.step import eager_step

from .test_fused_gpu import saved, step

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read once, at the first matrix product of the process
LAYERS, HIDDEN, TOKENS = (
    6,
    1024,
    8192,
)  # a copy takes about as long as a layer, so that one that is not waited for is seen
SCALE = 1e-4


@pytest.fixture(scope="module")
def large(tmp_path_factory: Any) -> str:
    config = Qwen2Config(
        vocab_size=5000, hidden_size=HIDDEN, intermediate_size=2816, num_hidden_layers=LAYERS, num_attention_heads=16,
        num_key_value_heads=4, max_position_embeddings=2048,
    )  # fmt: skip
    return saved(config, tmp_path_factory.mktemp("large"))


@pytest.fixture(autouse=True)
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def rows(lengths: list[int], seed: int) -> list[dict[str, list[int]]]:
    generator = torch.Generator().manual_seed(seed)
    made = []
    for length in lengths:
        ids = torch.randint(3, 5000, (length,), generator=generator).tolist()
        made.append({"input_ids": ids, "labels": ids})
    return made


def batches() -> list[dict[str, torch.Tensor]]:
    """Packed ones of one shape, and padded ones that shrink and grow."""
    packed = PackCollator(TOKENS, 24, max_length=512, max_targets=TOKENS)
    found = [packed(rows([512] * 16, 1)), packed(rows([400] * 20, 2))]
    found += [PadCollator(0)(rows([length] * 12, 3)) for length in (512, 64, 500)]
    return [{name: value.cuda() for name, value in batch.items()} for batch in found]


def gradients(model: Any, batch: dict[str, torch.Tensor]) -> tuple[float, torch.Tensor]:
    model.zero_grad()
    loss = eager_step(model)(batch, torch.tensor(SCALE, device="cuda")).item()
    return loss, torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])


def built(folder: str, kind: str, **changes: Any) -> Any:
    first = batches()[0]
    keys = {"gradient_checkpointing": True, "checkpoint_kind": kind, "mlp_chunk_tokens": 4096, **changes}
    return step(folder, first, **keys)[2]


@pytest.mark.parametrize("quantised", [False, True])
def test_inputs_in_main_memory_change_no_bit(large: str, quantised: bool) -> None:
    if quantised:
        pytest.importorskip("bitsandbytes")
    kept, sent = (built(large, kind, load_in_4bit=quantised) for kind in ("full", "offload"))
    assert sent.laras_path.fused.offloads
    for batch in [*batches(), *batches()]:
        expected, found = gradients(kept, batch), gradients(sent, batch)
        assert torch.equal(gradients(kept, batch)[1], expected[1])  # else the comparison would say nothing
        assert found[0] == expected[0]
        assert torch.equal(found[1], expected[1])


def test_memory_that_is_not_pinned_gives_the_same_bits(large: str) -> None:
    kept, sent = built(large, "full"), built(large, "offload")
    inputs = sent.laras_path.fused._inputs
    inputs._host.clear()
    inputs._pins = False
    for batch in batches():
        assert torch.equal(gradients(sent, batch)[1], gradients(kept, batch)[1])
    assert not any(room.is_pinned() for room in inputs._host.values())


def test_a_step_that_ends_early_leaves_nothing_to_the_next(large: str) -> None:
    sent, batch = built(large, "offload"), batches()[0]
    expected = gradients(sent, batch)

    def dies(_: torch.Tensor) -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    middle = next(p for name, p in sent.named_parameters() if f"layers.{LAYERS // 2}." in name and "lora_A" in name)
    handle = middle.register_hook(dies)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        gradients(sent, batch)
    handle.remove()
    torch.cuda.empty_cache()
    gradients(sent, batches()[3])
    found = gradients(sent, batch)
    assert found[0] == expected[0]
    assert torch.equal(found[1], expected[1])


def test_the_card_holds_the_inputs_of_two_layers(large: str) -> None:
    peaks, batch = {}, batches()[0]
    for kind in ("full", "offload"):
        model = built(large, kind)
        model.zero_grad()
        held = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        gradients(model, batch)
        peaks[kind] = torch.cuda.max_memory_allocated() - held
        if kind == "offload":
            assert model.laras_path.fused._inputs.host_bytes == (LAYERS - 1) * 2 * TOKENS * HIDDEN
        del model
    inputs = 2 * TOKENS * HIDDEN
    assert peaks["full"] - peaks["offload"] >= (LAYERS - 3) * inputs
