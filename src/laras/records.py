"""What happened: one frozen, versioned JSON record per stage.

    RunConfig → DatasetProfile → SplitManifest → TrainPlan → RunResult → EvalResult

Each record names its parent's digest, so that a run directory is a chain: a changed record no longer matches what
was built on it. Records hold facts only, no wall-clock time except in `Environment` and `RunResult`, so that equal
inputs give equal digests. Nothing here imports torch.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from laras.record_base import Record, Value

Format = Literal["text", "prompt-completion", "messages", "alpaca", "sharegpt"]
SplitName = Literal["train", "validation", "test"]
Precision = Literal["bf16", "fp16", "fp32"]
LossKind = Literal["full", "chunked"]
Optim = Literal["adamw_torch", "adamw_torch_fused", "adamw_8bit", "paged_adamw_8bit"]
CheckpointKind = Literal["none", "selective", "full", "offload"]
RunStatus = Literal["running", "finished", "interrupted", "failed"]


# ---------------------------------------------------------------- data


class RowProblem(Value):
    """One row that cannot be used, and why."""

    file: str
    line: int  # 1-based line of JSONL and CSV files, row number elsewhere
    reason: str
    action: Literal["stopped", "skipped"]


class SourceFile(Value):
    """One file the rows came from."""

    path: str  # as the user named it; never an absolute path of the machine unless the user wrote one
    bytes: int
    sha256: str


class LengthStats(Value):
    """Token lengths of a set of rendered examples, after truncation or dropping. All zero for an empty set."""

    rows: int
    min: int
    max: int
    mean: float
    median: float
    p90: float
    p95: float
    p99: float
    total: int
    target_total: int  # tokens that carry loss
    target_max: int | None = None  # most of one example; None: not counted
    target_share_max: float | None = None  # most of one example, of its tokens
    histogram_edges: tuple[int, ...] = ()  # len(histogram_counts) + 1, in tokens
    histogram_counts: tuple[int, ...] = ()


class DatasetProfile(Record):
    """What the data is: where it came from, its format, its lengths, what is wrong with it."""

    name: ClassVar[str] = "profile"
    source: str
    files: tuple[SourceFile, ...]
    format: Format
    rows: int  # read, bad ones included
    kept_rows: int
    problems: tuple[RowProblem, ...]
    tokens: LengthStats
    max_length_tokens: int  # the cap that was applied: min(config, model context)
    overlong: Literal["truncate", "drop", "error"]
    truncated_rows: int  # longer than the cap: cut, or dropped, as `overlong` says
    duplicate_rows: int  # rows equal to an earlier one
    near_duplicate_groups: int  # groups of two or more rows that are equal or nearly so
    mask_source: Literal["generation-markers", "derived", "boundary", "all-tokens"]
    tokenizer_digest: str
    chat_template_digest: str | None
    unused_columns: tuple[str, ...] = ()  # of the data, which the format has no use for


class SplitInfo(Value):
    """One split. For the sealed test set this is all that the rest of the program knows."""

    rows: int
    tokens: LengthStats
    sha256: str  # of the token ids and labels, independent of the file format


class SplitDrift(Value):
    """Distance between the token lengths of a split and those of train."""

    split: SplitName
    ks_statistic: float  # Kolmogorov-Smirnov, 0 to 1
    p_value: float


class SplitManifest(Record):
    """How the rows were divided."""

    name: ClassVar[str] = "split"
    seed: int
    ratios: tuple[float, float, float]  # train, validation, test
    stratify_by: str | None
    strata: dict[str, dict[str, int]] = Field(default_factory=dict)  # value of the field → rows in each split
    train: SplitInfo
    validation: SplitInfo
    test: SplitInfo
    drift: tuple[SplitDrift, ...] = ()
    excluded_rows: int = 0  # rows left out because they resemble rows of two splits
    members_sha256: str | None = None  # of `splits/members.parquet`: which content is in which split
    warnings: tuple[str, ...] = ()


# ---------------------------------------------------------------- planning


class ModelSpec(Value):
    """The architecture, from `config.json` alone."""

    source: str
    model_type: str
    architecture: str
    layers: int
    hidden_size: int
    intermediate_size: int
    attention_heads: int
    key_value_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    tie_word_embeddings: bool
    experts: int = 0
    experts_per_token: int = 0
    total_parameters: int
    linear_parameters: int  # in linear layers of the decoder, the head excluded
    embedding_parameters: int  # embedding, and the head where it is not tied
    is_counted: bool = False  # on the model itself, as its family has no table
    config_digest: str
    fused_refusal: str | None = None  # why its layers have no fused version; None: they have
    fused_longest_tokens: int | None = None  # longest document that the fused version takes; None: any


class HardwareSpec(Value):
    """The device planned for."""

    kind: Literal["cuda", "cpu"]
    gpu_name: str
    count: int
    total_bytes: int
    other_processes_bytes: int
    compute_capability: tuple[int, int] | None
    native_bf16: bool
    bandwidth_bytes_per_s: float
    peak_flops: dict[Precision, float]
    source: str  # "local", or the origin of the catalogue's figures
    host_link_bytes_per_s: float = 12e9  # of copies between main memory and the device, one way
    host_available_bytes: int | None = None  # main memory that a process can have; None: of a machine not known
    host_times_as_slow: float = 1.0  # what the host issues takes so many times as long as on the host that is known


class MemoryEstimate(Value):
    """Predicted bytes on one device."""

    train_peak_allocated_bytes: int
    train_peak_reserved_bytes: int
    eval_peak_allocated_bytes: int
    device_budget_bytes: int
    components: dict[str, int]
    peak_moment: str
    method: Literal["closed-form", "simulation", "closed-form of plain layers"]  # the last: for others'
    process_bytes: int = 0  # what a process holds on the device: reserved, CUDA context, paged states; 0: unknown
    host_bytes: int = 0  # of main memory, not swappable, that holds what the device does without meanwhile


class TimeEstimate(Value):
    """Predicted duration: tokens a second in training, optimizer steps, and seconds for these and all validations."""

    tokens_per_s: float
    steps: int
    total_s: float


class PlanChoices(Value):
    """Everything that training needs to know, fully resolved: no `auto`, no None that means auto."""

    per_device_train_batch_size: int
    per_device_eval_batch_size: int
    gradient_accumulation_steps: int
    gradient_checkpointing: bool
    packing: bool
    max_length: int
    finetuning_type: Literal["lora", "full"]
    load_in_4bit: bool
    load_in_8bit: bool
    precision: Precision
    optim: Optim
    backend: Literal["transformers", "unsloth"]
    attention: str
    loss_kind: LossKind
    lora_r: int
    lora_alpha: float
    lora_dropout: float
    use_rslora: bool
    use_dora: bool
    target_modules: tuple[str, ...]
    trainable_parameters: int
    total_parameters: int
    learning_rate: float
    eval_steps: int
    save_steps: int
    logging_steps: int
    bin_tokens: int | None = None  # of a packed batch; None: per_device_train_batch_size x max_length
    # How much of a fused layer is computed again in backward; read only with gradient_checkpointing, where `none`
    # stands for `full` (see `laras.models.fused.layer` for the bytes that each keeps). `offload` is `full` with what is
    # kept in main memory.
    checkpoint_kind: CheckpointKind = "none"
    cuda_graph: bool = False  # replay the step: for steps that the host limits
    fused_layers: bool = True  # where the architecture allows it; else transformers' own layers
    mlp_chunk_tokens: int = 4096  # tokens whose gate and up exist at once in a checkpointed fused layer
    loss_chunk_tokens: int = 1024  # target tokens whose logits exist at once

    @property
    def packed_tokens(self) -> int | None:
        """Slots of a packed batch; None where rows are padded."""
        if not self.packing:
            return None
        return self.bin_tokens or self.per_device_train_batch_size * self.max_length


class Alternative(Value):
    """A candidate that was not chosen."""

    per_device_train_batch_size: int
    gradient_checkpointing: bool
    packing: bool
    load_in_4bit: bool
    loss_kind: LossKind
    train_peak_allocated_bytes: int
    tokens_per_s: float
    fits: bool
    checkpoint_kind: CheckpointKind = "none"  # as in PlanChoices
    bin_tokens: int | None = None  # of a packed batch


class TrainPlan(Record):
    """What will run, and why."""

    name: ClassVar[str] = "plan"
    config_digest: str
    model: ModelSpec
    hardware: HardwareSpec
    choices: PlanChoices
    reasons: dict[str, str]  # choice → one line
    memory: MemoryEstimate
    time: TimeEstimate
    total_steps: int
    fits: bool
    alternatives: tuple[Alternative, ...] = ()
    remedies: tuple[str, ...] = ()  # when it does not fit: what would
    warnings: tuple[str, ...] = ()


# ---------------------------------------------------------------- running


class ParentRun(Record):
    """The run whose weights this one started from. The profile of this run names the digest of this record."""

    name: ClassVar[str] = "parent"  # its own parent digest is that of the other run's plan
    run: str  # name of its folder
    model: str  # `best`, `final` or `step-N`
    step: int | None
    eval_loss: float | None
    weights_sha256: str  # of the file of weights in `start/`


class Environment(Record):
    """Where the run happened. No user name, no path, no environment variable."""

    name: ClassVar[str] = "environment"
    laras_version: str
    python_version: str
    platform: str
    packages: dict[str, str]
    device: str
    driver: str | None
    processes: int
    created_at: str  # UTC, ISO 8601


class BestCheckpoint(Value):
    """The step with the lowest validation loss."""

    step: int
    eval_loss: float


class Measured(Value):
    """What the run really took; compared with the plan. Memory is resident memory on CPU."""

    peak_allocated_bytes: int
    peak_reserved_bytes: int
    tokens_per_s: float
    elapsed_s: float


class RunEvent(Value):
    """Something that a reader of the run should know: a resume, an out-of-memory split, a skipped step."""

    step: int
    kind: str
    detail: str


class PlanChange(Value):
    """One time that memory was less than planned."""

    step: int  # optimizer steps done before
    reason: str
    train_split_level: int
    eval_split_level: int


class PlanRevision(Record):
    """What of a plan no longer holds since memory ran out; its parent is the plan, which stays as it was.

    A micro-batch is cut to 1 / 2^level of the planned size, and the gradient of a step stays the same.
    """

    name: ClassVar[str] = "revision"
    train_split_level: int
    eval_split_level: int
    micro_batch: str  # the size in force, in rows or, packed, in tokens
    per_device_eval_batch_size: int
    changes: tuple[PlanChange, ...]


class RunResult(Record):
    """How training ended. Its parent is the plan's revision where there is one, else the plan."""

    name: ClassVar[str] = "result"
    status: RunStatus
    steps: int
    epochs: float
    train_loss: float | None
    best: BestCheckpoint | None
    stopped_early: bool
    measured: Measured
    events: tuple[RunEvent, ...] = ()


# ---------------------------------------------------------------- evaluation


class SplitScore(Value):
    """Exact metrics of one model on one split: shifted by one, over target tokens, token-weighted over the whole."""

    loss: float  # mean negative log-likelihood in nats per target token
    loss_ci95: tuple[float, float]  # bootstrap over examples
    perplexity: float
    perplexity_ci95: tuple[float, float]
    token_accuracy: float
    target_tokens: int
    examples: int


class Opening(Value):
    """One line of the sealed set's ledger."""

    opened_at: str  # UTC, ISO 8601
    purpose: str
    max_samples: int | None
    laras_version: str
    validation_trials: int = 1  # trials of a sweep that the validation set chose this model among


class EvalResult(Record):
    """The score on the sealed test set, base beside tuned."""

    name: ClassVar[str] = "evaluation"
    base: SplitScore
    tuned: SplitScore
    loss_improvement_ci95: tuple[float, float]  # base - tuned, paired bootstrap over examples
    openings: int


class Sample(Value):
    """What the base and the tuned model answer to one prompt, by greedy decoding."""

    row: int  # 0-based index in the source
    prompt: str  # as rendered, special tokens included
    reference: str  # the answer that the data gives
    base: str | None  # None where the base model was not at hand (full fine-tuning)
    tuned: str


class Samples(Record):
    """Answers of the base beside those of the tuned model."""

    name: ClassVar[str] = "samples"
    seed: int
    max_new_tokens: int
    samples: tuple[Sample, ...]
