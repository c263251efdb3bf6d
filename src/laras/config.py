"""What the user wants: one flat, frozen, validated record.

`"auto"` means that planning decides; a value is respected. `laras.config_file` reads it from YAML.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

Auto = Literal["auto"]
PROFILES = ("default", "conservative", "fast-look")
BUILTIN_MODEL = "builtin:smollm2-135m"
BUILTIN_DATASET = "builtin:stdlib"


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class DatasetFiles(_Frozen):
    """The dataset as explicit parts; validation and test are then checked for leakage against train."""

    train: str | tuple[str, ...] = Field(description="Training rows: file, folder, glob or Hub id, or several.")
    validation: str | None = Field(None, description="Validation rows; without them a share of train is taken.")
    test: str | None = Field(None, description="Test rows, which are sealed; without them a share of train is taken.")


class SplitConfig(_Frozen):
    """How rows are divided; `auto` follows the number of rows (see `laras.data.split`)."""

    train: Auto | Annotated[float, Field(gt=0, lt=1)] = Field("auto", description="Share of the rows to learn from.")
    validation: Auto | Annotated[float, Field(ge=0, lt=1)] = Field(
        "auto", description="Share that chooses the best step; 0: none."
    )
    test: Auto | Annotated[float, Field(ge=0, lt=1)] = Field(
        "auto", description="Share that is sealed for the score; 0: none."
    )
    stratify_by: str | None = Field(None, description="Field of the rows whose proportions every split keeps.")
    near_duplicate_threshold: Annotated[float, Field(gt=0, le=1)] = Field(
        0.8,
        description="Estimated Jaccard similarity of word 5-grams from which two rows share a split; 1: exact only.",
    )

    @model_validator(mode="after")
    def _ratios_add_up(self) -> Self:
        given = [value for value in (self.train, self.validation, self.test) if value != "auto"]
        if len(given) == 3 and abs(sum(given) - 1) > 1e-6:
            raise ValueError(f"train + validation + test is {sum(given):g}; they must add up to 1")
        if len(given) < 3 and sum(given) >= 1:
            raise ValueError(f"the given ratios add up to {sum(given):g}, which leaves nothing for the others")
        return self


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


# Names of transformers 5.17, `auto`, and `varlen` of `laras.models.attention`.
ATTENTION_NAMES = (
    "auto", "eager", "sdpa", "varlen", "flex_attention", "flash_attention_2", "flash_attention_3", "flash_attention_4",
)  # fmt: skip


class RunConfig(_Frozen):
    """Everything a user can decide about a run. Frozen; written to the run directory as given and as resolved."""

    profile: Literal["default", "conservative", "fast-look"] = Field("default", description="Named set of defaults.")

    # Model
    model_name_or_path: str = Field(BUILTIN_MODEL, min_length=1, description="Hub id, folder, or `builtin:…`.")
    model_revision: str | None = Field(None, description="Branch, tag or commit on the Hub.")
    trust_remote_code: bool = Field(False, description="Run Python code that a model repository brings.")
    chat_template: str | None = Field(None, description="Path of a Jinja file that replaces the tokenizer's template.")

    # Data
    dataset: str | DatasetFiles = Field(
        BUILTIN_DATASET, description="File, folder, glob, Hub id, `builtin:…`, or parts."
    )
    dataset_format: Literal["auto", "text", "prompt-completion", "messages", "alpaca", "sharegpt"] = Field(
        "auto", description="Format of the rows; `auto`: found by their columns."
    )
    columns: dict[str, str] = Field(
        default_factory=dict, description="Our field name → column in the data, e.g. {prompt: question}."
    )
    on_bad_rows: Literal["stop", "skip"] = Field(
        "stop", description="Stop with every bad row named, or skip and count them."
    )
    overlong: Literal["truncate", "drop", "error"] = Field("truncate", description="Examples beyond `max_length`.")
    completion_only_loss: bool = Field(True, description="Loss on assistant turns and completions only.")
    max_length: Annotated[int, Field(ge=8, le=10_000_000)] = Field(4096, description="Cap in tokens.")
    limit: Annotated[int, Field(ge=1)] | None = Field(None, description="Use only the first N rows (a trial run).")
    split: SplitConfig = Field(SplitConfig(), description="Shares of train, validation and test, and how rows group.")

    # Method
    finetuning_type: Literal["lora", "full"] = Field("lora", description="Train low-rank adapters, or all weights.")
    lora_r: Auto | Annotated[int, Field(ge=1, le=4096)] = Field(
        "auto", description="Rank of the adapters; `auto`: 8, 16 or 32 by the number of parameters."
    )
    lora_alpha: Auto | Annotated[float, Field(gt=0, le=1_000_000)] = Field(
        "auto", description="Scale of the adapters; `auto`: twice the rank."
    )
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0, description="Dropout of the adapters' input; above 0 the fused layers are not used."
    )
    lora_target_modules: Auto | Literal["all-linear"] | tuple[str, ...] = Field(
        "auto", description="Names of the linear layers that get adapters; `auto`: all but the head."
    )
    use_rslora: Auto | bool = Field(
        "auto", description="Scale by alpha / sqrt(rank); `auto`: from 3 billion parameters."
    )
    use_dora: bool = Field(False, description="Weight-decomposed adapters; slower.")
    load_in_4bit: Auto | bool = Field(
        "auto", description="Base weights in 4 bits (NF4); `auto`: when they do not fit otherwise."
    )
    load_in_8bit: bool = Field(False, description="Base weights in 8 bits.")

    # Optimization: never changed by planning
    effective_batch_size: Annotated[int, Field(ge=1, le=1_000_000)] = Field(
        16, description="Sequences per optimizer step."
    )
    num_train_epochs: Annotated[float, Field(gt=0, le=100_000)] = Field(
        3.0, description="Passes over the training rows."
    )
    max_steps: Annotated[int, Field(ge=1)] | None = Field(None, description="Optimizer steps, whatever the epochs.")
    learning_rate: Auto | Annotated[float, Field(gt=0, le=1)] = Field("auto", description="LoRA 2e-4, full 2e-5.")
    lr_scheduler_type: Literal["cosine", "linear", "constant", "constant_with_warmup"] = Field(
        "cosine", description="How the learning rate falls after the warm-up."
    )
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.1, description="Share of all steps in which the learning rate rises."
    )
    weight_decay: Annotated[float, Field(ge=0)] = Field(0.01, description="Decoupled weight decay.")
    max_grad_norm: Annotated[float, Field(ge=0)] = Field(
        1.0, description="Gradients are scaled down to this norm; 0: never."
    )
    seed: Annotated[int, Field(ge=0, lt=2**32)] = Field(42, description="Of splits, order, adapters and dropout.")
    full_determinism: bool = Field(False, description="Bit-exact on GPU too; slower.")

    # Execution: planned when `auto`
    backend: Literal["auto", "transformers", "unsloth"] = Field(
        "auto",
        description="Library that builds the layers; `auto`: Laras' own unless another was measured to be faster.",
    )
    precision: Literal["auto", "bf16", "fp16", "fp32"] = Field(
        "auto", description="What layers compute in; `auto`: bf16, fp16 or fp32, by what the device has."
    )
    attn_implementation: str = Field(
        "auto", description="Kernel of the attention, by its name in transformers; `auto`: planned."
    )
    loss_kind: Literal["auto", "full", "chunked"] = Field(
        "auto", description="Logits of a batch whole, or in chunks, which takes less memory."
    )
    packing: Auto | bool = Field(
        "auto", description="Several documents in one row without seeing each other, instead of padding."
    )
    cuda_graph: Auto | bool = Field(
        "auto", description="Replay the step as one launch, where the host is the limit; needs packing and a GPU."
    )
    gradient_checkpointing: Auto | bool = Field(
        "auto", description="Compute activations again in backward: less memory, slower."
    )
    per_device_train_batch_size: Auto | Annotated[int, Field(ge=1)] = Field(
        "auto", description="Rows in one forward pass; with packing, their longest length makes the bin."
    )
    per_device_eval_batch_size: Auto | Annotated[int, Field(ge=1)] = Field(
        "auto", description="Rows in one forward pass of validation; changes no score."
    )
    gradient_accumulation_steps: Auto | Annotated[int, Field(ge=1)] = Field(
        "auto", description="Micro-batches of an optimizer step."
    )
    optim: Literal["auto", "adamw_torch", "adamw_torch_fused", "adamw_8bit", "paged_adamw_8bit"] = Field(
        "auto", description="AdamW and how its states are kept."
    )
    gpu: str | None = Field(None, description="Plan for this GPU of the catalogue instead of the local one.")
    memory_budget_fraction: Auto | Annotated[float, Field(gt=0, le=1)] = Field(
        "auto",
        description="Share of the free device memory that a plan may use; auto: 0.98 of a GPU (0.95 where there are "
        "several), 0.9 of main memory.",
    )

    # Validation and saving
    eval_steps: Auto | Annotated[int, Field(ge=1)] = Field("auto", description="Optimizer steps between validations.")
    save_steps: Auto | Annotated[int, Field(ge=1)] = Field("auto", description="Optimizer steps between checkpoints.")
    logging_steps: Auto | Annotated[int, Field(ge=1)] = Field(
        "auto", description="Optimizer steps between lines of the metrics; auto: 10, fewer in a run below 500 steps."
    )
    save_total_limit: Annotated[int, Field(ge=1)] = Field(
        3, description="Newest checkpoints that are kept; the best one is kept too."
    )
    early_stopping_patience: Annotated[int, Field(ge=1)] | None = Field(
        5, description="Validations without improvement after which training stops; null: never."
    )
    early_stopping_min_delta: Annotated[float, Field(ge=0)] = Field(
        0.001, description="Fall of the validation loss that counts as an improvement."
    )
    max_skipped_steps: Annotated[int, Field(ge=1)] = Field(
        5, description="Steps in a row whose loss or gradient is not finite, after which training stops."
    )

    # Output
    output_dir: str = Field("runs", min_length=1, description="Folder of the runs.")
    run_name: str | None = Field(
        None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$", description="Default: date, model, digest."
    )
    report_to: Annotated[tuple[Literal["tensorboard", "wandb", "trackio"], ...], BeforeValidator(_as_list)] = Field(
        ("tensorboard",), description="Trackers; the metrics file is always written."
    )

    @model_validator(mode="after")
    def _choices_agree(self) -> Self:
        problems = []
        if self.load_in_4bit is True and self.load_in_8bit:
            problems.append("load_in_4bit and load_in_8bit are both true; choose one")
        if self.finetuning_type == "full" and (self.load_in_4bit is True or self.load_in_8bit):
            problems.append("full fine-tuning needs unquantised weights; set load_in_4bit/load_in_8bit to false")
        if self.finetuning_type == "full" and self.use_dora:
            problems.append("use_dora is a kind of LoRA; remove it or set finetuning_type: lora")
        if "/" not in self.attn_implementation and self.attn_implementation not in ATTENTION_NAMES:
            problems.append(
                f"attn_implementation {self.attn_implementation!r:.80} is not known; one of "
                f"{', '.join(ATTENTION_NAMES)}, or a kernel of the Hub as OWNER/NAME"
            )
        if "/" in self.attn_implementation and not self.trust_remote_code:
            problems.append(
                f"attn_implementation {self.attn_implementation!r:.80} names a kernel of the Hub, which is code; "
                "read it, then set trust_remote_code: true"
            )
        micro, accumulation = self.per_device_train_batch_size, self.gradient_accumulation_steps
        if micro != "auto" and self.effective_batch_size % micro:
            problems.append(
                f"effective_batch_size {self.effective_batch_size} is not a multiple of "
                f"per_device_train_batch_size {micro}"
            )
        elif micro != "auto" and accumulation != "auto" and self.effective_batch_size % (micro * accumulation):
            problems.append(
                f"per_device_train_batch_size {micro} x gradient_accumulation_steps {accumulation} does not divide "
                f"effective_batch_size {self.effective_batch_size}"
            )
        if problems:
            raise ValueError("; ".join(problems))
        return self
