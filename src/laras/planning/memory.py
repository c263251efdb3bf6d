"""Peak memory of a training step and of an evaluation batch, in closed form.

The model is transformers' eager decoder with fused attention under PEFT. Per token and layer, backward keeps the norms'
copies and outputs, query, key, value and attention output, the MLP's products, and the LoRA bottlenecks; the peak is
either at the loss, where three fp32 tensors of the logits' size live, or in the backward of the last layer.

Source: derived from the operations; checked against 45 cases measured on an H100 (torch 2.11, transformers 5.17), Qwen2
and Llama shapes: `max_memory_allocated` within 1.6%, 0.3% on average. Evaluation, full fine-tuning, int8 and 8-bit
optimizers follow from the same terms and are not yet measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from laras.planning.architecture import family_of
from laras.planning.fused_memory import fused_peak, fused_static_bytes, offloaded_bytes
from laras.records import CheckpointKind, HardwareSpec, LossKind, MemoryEstimate, ModelSpec, Optim, Precision

Weights = Literal["bf16", "fp16", "fp32", "nf4", "int8"]
Adapters = Literal["compute", "fp32", "fp32-autocast"]
_MIB = 2**20
_ELEMENT_BYTES: dict[str, int] = {"bf16": 2, "fp16": 2, "fp32": 4}
# NF4 with double quantisation: half a byte, an 8-bit scale per 64 weights, an fp32 scale per 256 of those.
_NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
# Two 8-bit states with an fp32 scale per block of 256 each.
_STATES_8BIT_BYTES = 2 * (1 + 4 / 256)
# cuBLAS workspaces on Hopper and on other cards, as torch reserves them.
_WORKSPACE_SM90_BYTES, _WORKSPACE_BYTES = 66 * _MIB, int(16.25 * _MIB)
# CUDA context with the kernels of a step loaded. Measured on an H100; elsewhere taken on the careful side.
_CONTEXT_SM90_BYTES, _CONTEXT_BYTES = 770 * _MIB, 600 * _MIB
# Resident memory of a process that has loaded the libraries and nothing else. Source: `laras train` of a model of 0.1M
# parameters (torch 2.13, Linux), 553 MiB; imports alone are 516 MiB. docs/concepts/memory.md has the rest of a CPU run.
_CPU_PROCESS_BYTES = 550 * _MIB
# What the C library holds beyond the live tensors: blocks below 32 MiB stay with it when they are freed, and larger
# ones come on top. Fitted to five runs on a CPU, see docs/concepts/memory.md.
_CPU_HEAP = 0.2
# Tensors of an output's size that DoRA keeps beside a quantised layer, counted in simulated steps.
_DORA_COPIES = {"nf4": 3, "int8": 4}
# With a capacity cap the allocator fits a step into this multiple of what is allocated; measured.
_ALLOCATOR_SLACK = 1.03


@dataclass(frozen=True)
class MemoryCase:
    """What decides a step's memory, besides the architecture.

    Attributes:
        micro_batch: Rows in a forward pass.
        length_tokens: Tokens in a row, padding included.
        bin_tokens: Of a packed batch, whatever its rows; None where rows are padded.
        eval_batch: Rows in an evaluation batch.
        checkpointing: Layers recompute their activations in backward.
        full: All weights train instead of adapters.
        weights: How the base weights are stored.
        precision: What the layers compute in.
        adapters: Type of the adapters: that of the computation, or fp32 without or under autocast.
        optim: Optimizer.
        loss_kind: Logits whole, or in chunks.
        lora_r: Rank of the adapters.
        target_modules: Names of the linear layers that get adapters; empty means all.
        keeps_gradients: Gradients of earlier micro-batches are held (accumulation above one).
        fused: Fused layers (`laras.models.fused`) instead of transformers' own.
        checkpoint_kind: How much of a fused layer is computed again, where `checkpointing` is on.
        mlp_chunk_tokens: Tokens whose gate and up exist at once in a checkpointed fused layer.
        loss_chunk_tokens: Tokens whose logits exist at once; 0 takes about as many bytes as the hidden states.
        dora: The adapters are weight-decomposed.
        dropout: Inputs of the adapters are dropped in part.
    """

    micro_batch: int
    length_tokens: int
    bin_tokens: int | None = None
    eval_batch: int = 1
    checkpointing: bool = True
    full: bool = False
    weights: Weights = "bf16"
    precision: Precision = "bf16"
    adapters: Adapters = "fp32-autocast"
    optim: Optim = "adamw_torch_fused"
    loss_kind: LossKind = "full"
    lora_r: int = 16
    target_modules: tuple[str, ...] = ()
    keeps_gradients: bool = False
    fused: bool = False
    checkpoint_kind: CheckpointKind = "none"
    mlp_chunk_tokens: int = 4096
    loss_chunk_tokens: int = 0
    dora: bool = False
    dropout: bool = False

    @property
    def tokens(self) -> int:
        """Of a forward pass, padding included."""
        return self.bin_tokens or self.micro_batch * self.length_tokens


def linear_layers(spec: ModelSpec) -> tuple[tuple[str, int, int], ...]:
    """Name, inputs and outputs of each linear layer of one decoder layer that can carry an adapter.

    Experts are stored as fused parameters, not as linear layers, so a mixture of experts has its attention only.
    """
    hidden, width = spec.hidden_size, spec.intermediate_size
    query, key_value = spec.attention_heads * spec.head_dim, spec.key_value_heads * spec.head_dim
    fused_qkv = query + 2 * key_value
    separate = (("q_proj", hidden, query), ("k_proj", hidden, key_value), ("v_proj", hidden, key_value))
    if spec.model_type == "gpt_neox":
        attention = (("query_key_value", hidden, fused_qkv), ("dense", query, hidden))
        mlp = (("dense_h_to_4h", hidden, width), ("dense_4h_to_h", width, hidden))
    elif spec.model_type == "gpt2":
        attention = (("c_attn", hidden, fused_qkv), ("c_proj", query, hidden))
        mlp = (("c_fc", hidden, width), ("c_proj", width, hidden))
    elif spec.model_type == "phi3":
        attention = (("qkv_proj", hidden, fused_qkv), ("o_proj", query, hidden))
        mlp = (("gate_up_proj", hidden, 2 * width), ("down_proj", width, hidden))
    elif spec.model_type == "phi":
        return (*separate, ("dense", query, hidden), ("fc1", hidden, width), ("fc2", width, hidden))
    elif spec.model_type == "starcoder2":
        return (*separate, ("o_proj", query, hidden), ("c_fc", hidden, width), ("c_proj", width, hidden))
    else:
        decoder = (*separate, ("o_proj", query, hidden))
        gated = (("gate_proj", hidden, width), ("up_proj", hidden, width), ("down_proj", width, hidden))
        return decoder if spec.experts else (*decoder, *gated)
    return (*attention, *mlp)


def adapted_layers(spec: ModelSpec, target_modules: Sequence[str]) -> tuple[tuple[str, int, int], ...]:
    """Those of `linear_layers` that the targets name; empty or `all-linear` means all."""
    layers = linear_layers(spec)
    if not target_modules or tuple(target_modules) == ("all-linear",):
        return layers
    return tuple(layer for layer in layers if layer[0] in target_modules)


def lora_parameters(spec: ModelSpec, rank: int, target_modules: Sequence[str] = ()) -> int:
    """Parameters of LoRA adapters of that rank."""
    return spec.layers * rank * sum(inputs + outputs for _, inputs, outputs in adapted_layers(spec, target_modules))


def estimate_memory(spec: ModelSpec, case: MemoryCase, hardware: HardwareSpec, budget_bytes: int) -> MemoryEstimate:
    """Predicted peaks, in bytes.

    The components add up to the allocated peak of training. `reserved` is what the allocator needs to hold it.
    """
    static = static_bytes(spec, case)
    workspace = workspace_bytes(hardware)
    held = static["gradients"] if case.keeps_gradients else 0
    kept, moment_bytes, moment = _training_peak(spec, case)
    if hardware.kind == "cpu" and case.loss_kind == "chunked":
        moment_bytes, moment = _with_reference_loss(spec, case, moment_bytes, moment)
    gradients = max(held, static["gradients"] - kept - moment_bytes)
    components = {
        **static,
        "gradients": gradients,
        "activations": kept,
        moment: moment_bytes,
        "workspace": workspace,
    }
    evaluation = sum(static.values()) - static["gradients"] + _evaluation_bytes(spec, case)
    if hardware.kind == "cpu":
        components["heap"] = int(_CPU_HEAP * (sum(components.values()) - workspace))
        evaluation += int(_CPU_HEAP * evaluation)
    peak = sum(components.values())
    eval_peak = evaluation + workspace
    offloads = case.fused and case.checkpointing and case.checkpoint_kind == "offload"
    tokens = case.tokens
    return MemoryEstimate(
        train_peak_allocated_bytes=peak,
        train_peak_reserved_bytes=int(peak * _ALLOCATOR_SLACK),
        eval_peak_allocated_bytes=eval_peak,
        device_budget_bytes=budget_bytes,
        components=components,
        peak_moment="loss" if moment == "logits" else "backward of the last layer",
        method="closed-form",
        host_bytes=offloaded_bytes(spec, tokens, _ELEMENT_BYTES[case.precision]) if offloads else 0,
    )


def context_bytes(hardware: HardwareSpec) -> int:
    """What the process holds on the device outside the allocator."""
    if hardware.kind == "cpu":
        return 0
    return _CONTEXT_SM90_BYTES if (hardware.compute_capability or (0, 0)) >= (9, 0) else _CONTEXT_BYTES


def workspace_bytes(hardware: HardwareSpec) -> int:
    """What cuBLAS keeps inside the allocator, for the forward and the backward thread; on a CPU, the libraries' own."""
    if hardware.kind == "cpu":
        return _CPU_PROCESS_BYTES
    return _WORKSPACE_SM90_BYTES if hardware.compute_capability == (9, 0) else _WORKSPACE_BYTES


def static_bytes(spec: ModelSpec, case: MemoryCase) -> dict[str, int]:
    """Bytes that live through a step: weights, adapters, optimizer states, and the gradients when all are there."""
    element = _ELEMENT_BYTES[case.precision]
    rest = spec.total_parameters - spec.linear_parameters
    stored = {"nf4": _NF4_BYTES, "int8": 1.0}.get(case.weights)
    if stored is None:
        weights = _ELEMENT_BYTES[case.weights] * spec.total_parameters
    else:
        weights = int(stored * spec.linear_parameters) + element * rest
    if case.full:
        trained, adapters, size = spec.total_parameters, 0, weights / spec.total_parameters
    else:
        trained = lora_parameters(spec, case.lora_r, case.target_modules)
        size = element if case.adapters == "compute" else 4
        adapters = int(trained * size)
    states = _STATES_8BIT_BYTES if case.optim.endswith("8bit") else 2 * size
    if case.optim.startswith("paged"):
        states = 2 * 4 / 256  # the scales alone stay on the device
    if case.fused:
        adapters += fused_static_bytes(spec, case, element)
    return {
        "weights": weights,
        "adapters": adapters,
        "optimizer": int(trained * states),
        "gradients": int(trained * size),
    }


def layer_activation_bytes(spec: ModelSpec, case: MemoryCase) -> int:
    """Bytes per token that one layer keeps for its backward."""
    element, family = _ELEMENT_BYTES[case.precision], family_of(spec.model_type)
    hidden, width = spec.hidden_size, spec.intermediate_size * max(1, spec.experts_per_token)
    query, key_value = spec.attention_heads * spec.head_dim, spec.key_value_heads * spec.head_dim
    norm_copies = family.norms * hidden * (element if family.norm_bias else 4)
    attention = 4 * spec.attention_heads + element * (2 * query + 2 * key_value)
    mlp = element * width * (3 if family.gated else 1)
    layers = () if case.full else adapted_layers(spec, case.target_modules)
    quantised = case.weights in ("nf4", "int8")
    separate_copies = not case.full and case.adapters != "compute" and element == 2 and not quantised
    if separate_copies:
        # PEFT casts the input of an adapter beside whole weights to fp32; autocast brings it back, a copy of its own.
        copy_size = 4 if case.adapters == "fp32" else 2
        inputs = copy_size * sum(size for _, size, _ in layers)
    else:
        inputs = element * (family.norms * hidden + width)
    if layers and case.dropout:
        inputs += sum(size for _, size, _ in layers)  # a mask of one byte
    if layers and case.dora:  # what base and adapter gave, each multiplied by a magnitude
        inputs += _DORA_COPIES.get(case.weights, 2) * element * sum(size for _, _, size in layers)
        if quantised:  # whose result then stays in fp32
            mlp = mlp * 4 // element
    rank_size = 4 if case.adapters == "fp32" else element
    return norm_copies + attention + mlp + inputs + len(layers) * case.lora_r * rank_size


def _training_peak(spec: ModelSpec, case: MemoryCase) -> tuple[int, int, str]:
    """Activations kept, and what comes on top at the peak, with the name of its component."""
    if case.fused:
        return fused_peak(spec, case, adapted_layers(spec, case.target_modules), _ELEMENT_BYTES[case.precision])
    tokens = case.tokens
    element, hidden = _ELEMENT_BYTES[case.precision], spec.hidden_size
    width = spec.intermediate_size * max(1, spec.experts_per_token)
    layer = layer_activation_bytes(spec, case) * tokens
    residual = element * hidden * tokens
    cast_adapters = 0
    if case.adapters == "fp32-autocast" and element == 2 and not case.full and not case.checkpointing:
        cast_adapters = element * lora_parameters(spec, case.lora_r, case.target_modules)
    kept = (spec.layers * residual if case.checkpointing else spec.layers * layer + residual) + cast_adapters
    if case.checkpointing and case.weights == "int8":
        # bitsandbytes keeps the inputs of its products where checkpointing does not see them.
        inputs = (family_of(spec.model_type).norms + 1) * hidden + spec.attention_heads * spec.head_dim + width
        kept += spec.layers * element * inputs * tokens
    if case.loss_kind == "full":
        logits = 4 * hidden * tokens + 12 * tokens * spec.vocab_size
    else:
        chunk = min(tokens, case.loss_chunk_tokens) or _chunk_tokens(tokens, spec)
        logits = (4 + 2 * element) * hidden * tokens + element * chunk * (spec.vocab_size + hidden)
    gradients = (8 if case.adapters == "fp32" and element == 2 else 2 * element) * width * tokens + residual
    backward = gradients + _dequantised_bytes(spec, case) + _weight_norm_bytes(spec, case)
    # Without checkpointing the last layer's own activations are part of what is kept; the embedding's are freed later.
    backward += layer if case.checkpointing else -residual
    return (kept, logits, "logits") if logits > backward else (kept, backward, "layer_backward")


def _with_reference_loss(spec: ModelSpec, case: MemoryCase, top: int, moment: str) -> tuple[int, str]:
    """The top of the peak where the loss of a chunk goes through PyTorch: two more tensors of its logits' size."""
    tokens = case.tokens
    element = _ELEMENT_BYTES[case.precision]
    chunk = min(tokens, case.loss_chunk_tokens or tokens)
    loss = element * (4 * spec.hidden_size * tokens + 3 * chunk * spec.vocab_size)
    return (loss, "logits") if loss > top else (top, moment)


def _evaluation_bytes(spec: ModelSpec, case: MemoryCase) -> int:
    """Bytes of an evaluation batch: one layer's working set, then logits, their fp32 copy and log-probabilities."""
    tokens = case.eval_batch * case.length_tokens
    element = _ELEMENT_BYTES[case.precision]
    copies = (0 if element == 4 else 4) + element + 4
    logits = min(tokens, case.loss_chunk_tokens) or tokens  # evaluation of a plain head goes in chunks too
    head = copies * spec.vocab_size * logits + 2 * element * spec.hidden_size * tokens
    return max(head, layer_activation_bytes(spec, case) * tokens + _dequantised_bytes(spec, case))


def _dequantised_bytes(spec: ModelSpec, case: MemoryCase) -> int:
    """The largest quantised matrix, unpacked for one product, with its scales in fp32."""
    if case.weights not in ("nf4", "int8"):
        return 0
    largest = max(inputs * outputs for _, inputs, outputs in linear_layers(spec))
    return int(largest * (_ELEMENT_BYTES[case.precision] + 4 / 64))


def _weight_norm_bytes(spec: ModelSpec, case: MemoryCase) -> int:
    """What DoRA takes to norm the largest of its matrices: the identity that goes through the adapter, and sums.

    Source: peft 0.19 `tuners/lora/dora.py`, `get_lora_weight` and `get_weight_norm`.
    """
    if not case.dora or case.full:
        return 0
    element = _ELEMENT_BYTES[case.precision]
    identity = 4 + (element if element == 2 else 0)
    layers = adapted_layers(spec, case.target_modules)
    return max((identity * ins * ins + 4 * element * ins * outs for _, ins, outs in layers), default=0)


def _chunk_tokens(tokens: int, spec: ModelSpec) -> int:
    """Tokens whose logits are computed at once: logits of about the size of the hidden states, a power of two."""
    chunks = -(-spec.vocab_size // spec.hidden_size)
    return int(1 << max(0, -(-tokens // chunks) - 1).bit_length())
