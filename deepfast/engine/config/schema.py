"""The schema: every key, its type, its default and what it means."""

from __future__ import annotations

import math
import types
import typing
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PrivateAttr, SerializeAsAny, Strict

from deepfast.optimizers import OPTIMIZERS


def _whole(value: Any) -> Any:
    """5e8 is a whole number, too, and so is numpy's."""
    if isinstance(value, float):
        return int(value) if value.is_integer() else value
    return int(value) if hasattr(value, "__index__") and not isinstance(value, bool) else value


Int = Annotated[int, BeforeValidator(_whole)]
Rate = Annotated[float, Field(ge=0, le=1e6)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class Lax(Section):
    """In which DeepSpeed takes "16" for 16, and "true" for true."""

    model_config = ConfigDict(strict=False)


class Fp16(Lax):
    enabled: bool = Field(False, description="train with fp16 weights and gradients (`fp16: true` for short)")
    initial_scale_power: Int = Field(16, ge=0, description="a dynamic scale starts at 2 to this power, 24 at most")
    loss_scale_window: Int = Field(1000, gt=0, lt=2**24, description="clean steps until a dynamic scale doubles")
    hysteresis: Int = Field(2, gt=0, lt=2**24, description="overflows until a dynamic scale halves")
    consecutive_hysteresis: bool = Field(False, description="a clean step refills the hysteresis")
    min_loss_scale: float = Field(1.0, ge=0, le=2**24, description="lower bound of a dynamic scale; 0: hardly any")
    max_skips_at_minimum: int = Field(
        20, gt=0, lt=2**31, description="so many skipped steps in a row at the lowest or a static scale are an error"
    )
    auto_cast: bool = Field(
        False,
        description="floating-point inputs are cast to the compute type; false: only where a layer needs it",
    )


class Bf16(Lax):
    enabled: bool = Field(False, description="train with bf16 weights and gradients (`bf16: true` for short)")
    check_grad_overflow: bool = Field(True, description="skip steps with infinite or NaN gradients, as under fp16")


_MomentForm = Literal["fp32", "bf16", "param", "int8"]


class OptimizerParams(Section):
    lr: Rate | None = Field(None, description="peak learning rate; the trainer's default is 5e-4")
    betas: Annotated[tuple[float, float], Strict(False)] | None = Field(
        None, description="decay rates of the moments; the trainer's are [0.9, 0.95] for AdamW"
    )
    eps: float | None = Field(None, gt=0, description="added to the denominator; each optimizer has its own default")
    weight_decay: float | None = Field(None, ge=0, description="the trainer's is 0.1, and on matrices only")
    amsgrad: bool = Field(False, description="AMSGrad variant")
    bias_correction: bool = Field(True, description="false: moments are not corrected for their bias")
    adam_w_mode: bool = Field(True, description="false, with type Adam: weight decay goes through the gradient")
    torch_adam: bool = Field(False, description="the default of weight decay is torch's: 0.01 of AdamW")
    momentum: float = Field(0.0, ge=0, description="of SGD")
    dampening: float = Field(0.0, description="of SGD's momentum")
    nesterov: bool = Field(False, description="SGD with Nesterov momentum")
    lr_decay: float = Field(0.0, ge=0, description="of Adagrad")
    initial_accumulator_value: float = Field(0.0, ge=0, description="of Adagrad")
    master: Literal["auto", "split", "fp32", "none"] = Field(
        "auto", description="how the fp32 value of a 16-bit weight is kept: `auto` is `split`, in two bytes"
    )
    state_dtype: _MomentForm | dict[str, _MomentForm] = Field(
        "fp32", description='how moments are kept: `fp32`, `bf16`, `int8`, `param`, or `{"exp_avg": "bf16"}`'
    )
    rounding: Literal["nearest", "stochastic"] = Field("nearest", description="of weights with `master: none`")
    seed: Int = Field(0, ge=0, lt=2**63, description="of what is rounded by chance: such weights, and int8 moments")


class TorchParams(OptimizerParams):
    """Those of an optimizer of torch's, which are what its signature says (``named.check``)."""

    model_config = ConfigDict(extra="allow")

    betas: Any = None
    eps: Any = None


class OptimizerSection(Section):
    type: str = Field(
        "AdamW",
        description=f"{', '.join(OPTIMIZERS)} in any case, or a class of `torch.optim`; DeepSpeed's Adam is AdamW, "
        "LAMB the paper's",
    )
    params: SerializeAsAny[OptimizerParams] = Field(default_factory=OptimizerParams, description="its hyperparameters")


Rates = Rate | list[Rate]
Momenta = Annotated[float, Field(ge=0, lt=1)] | list[Annotated[float, Field(ge=0, lt=1)]]


class SchedulerParams(Section):
    warmup_min_lr: Rates = Field(0.0, description="learning rate at the start of the warm-up; a list: of each group")
    warmup_max_lr: Rates | None = Field(
        None, description="after it; default: the optimizer's lr, of WarmupDecayLR 0.001"
    )
    warmup_type: Literal["log", "linear"] = Field("log", description="shape of the warm-up")
    cos_min_ratio: float = Field(0.0001, ge=0, le=1, description="WarmupCosineLR ends at this share of the peak")
    warmup_min_ratio: float = Field(0.0, ge=0, le=1, description="WarmupCosineLR starts at this share of the peak")
    last_batch_iteration: Int = Field(-1, ge=-1, lt=2**62, description="steps of this schedule that lie behind, less 1")
    lr_range_test_min_lr: Rates = Field(1e-3, description="of LRRangeTest: where it begins")
    lr_range_test_step_size: Int = Field(2000, gt=0, lt=2**62, description="steps in which it grows once")
    lr_range_test_step_rate: float = Field(1.0, ge=0, le=1e6, description="by this times `lr_range_test_min_lr`")
    lr_range_test_staircase: bool = Field(False, description="all at once, at the end of those steps")
    cycle_min_lr: Rates | None = Field(None, description="of OneCycle: the learning rate at its ends; required")
    cycle_max_lr: Rates | None = Field(None, description="at its peak; required")
    cycle_first_step_size: float = Field(2000.0, gt=0, le=2**62, description="steps up to the peak")
    cycle_second_step_size: float | None = Field(None, ge=0, le=2**62, description="down again; default: as many")
    cycle_first_stair_count: Int = Field(0, ge=0, lt=2**31, description="stairs up; 0: a line")
    cycle_second_stair_count: Int | None = Field(None, ge=0, lt=2**31, description="down; default: as many")
    decay_step_size: float = Field(0.0, ge=0, le=2**62, description="after the cycle, steps of a decay; 0: none")
    decay_lr_rate: float = Field(0.0, ge=0, le=1e6, description="in which lr is divided by 1 more of this")
    cycle_momentum: bool = Field(True, description="the first beta moves against the learning rate; the second is 0.99")
    cycle_min_mom: Momenta = Field(0.8, description="the first beta at the peak, and in the first step")
    cycle_max_mom: Momenta = Field(0.9, description="at the ends")
    decay_mom_rate: float = Field(0.0, ge=0, le=1e6, description="after the cycle it is multiplied by 1 more of this")


_WARMUP = "warmup_min_lr warmup_max_lr warmup_type last_batch_iteration"
# type -> what its params may hold
SCHEDULERS = {
    "WarmupLR": _WARMUP,
    "WarmupDecayLR": _WARMUP,
    "WarmupCosineLR": "warmup_min_ratio cos_min_ratio warmup_type last_batch_iteration",
    "OneCycle": " ".join(name for name in SchedulerParams.model_fields if name.startswith(("cycle_", "decay_")))
    + " last_batch_iteration",
    "LRRangeTest": " ".join(name for name in SchedulerParams.model_fields if name.startswith("lr_range_test_"))
    + " last_batch_iteration",
    "WarmupCosine": "warmup_max_lr",
}


class SchedulerSection(Section):
    type: str = Field(
        description="DeepSpeed's WarmupLR, WarmupDecayLR, WarmupCosineLR (after the warm-up constant, linear, cosine), "
        "OneCycle, LRRangeTest; or the trainer's WarmupCosine: a linear warm-up from the first step on, then a cosine "
        "to a tenth"
    )
    params: SchedulerParams = Field(default_factory=SchedulerParams, description="its settings")


Dtype = Literal["fp32", "fp16", "bf16"]


class DataTypes(Section):
    grad_accum_dtype: Dtype | None = Field(None, description="micro-batches are summed in fp32, whatever it is")


class Zero(Lax):
    stage: Annotated[Int, Field(ge=0, le=3)] = Field(
        0,
        description="1, 2: each rank keeps a part of the optimizer's state and of the gradients' sums; 3: of the "
        "weights, too (`zero_optimization: true` is stage 1)",
    )
    stage3_param_persistence_threshold: Int = Field(
        100_000, ge=0, description="of stage 3: a block of fewer parameters is gathered with what is around it"
    )


class _Files(Section):
    output_path: str = Field("", description="a folder; empty: the current one")
    job_name: str = Field("DeepSpeedJobName", min_length=1, description="the folder in it")


class TensorBoard(_Files):
    enabled: bool = Field(False, description="rank 0 writes TensorBoard events of each step")


class CsvMonitor(_Files):
    enabled: bool = Field(False, description="rank 0 writes a CSV file for each event's name")


class Wandb(Section):
    enabled: bool = Field(False, description="rank 0 sends events of each step to Weights & Biases")
    group: str | None = Field(None, description="of runs")
    team: str | None = Field(None, description="whose project it is")
    project: str = Field("deepspeed", min_length=1, description="the run's")


def _never(value: Any) -> Any:
    """accelerate writes infinity where nothing is to be printed."""
    return None if value == math.inf else value


def _trainers(default: Any, *, description: str, **limits: Any) -> Any:
    """A key that ``deepfast.initialize`` does nothing with."""
    return Field(default, description=f"trainer: {description}", json_schema_extra={"trainer": True}, **limits)


class Config(Section):
    """What a run is; see ``load``."""

    train_batch_size: Int | None = Field(
        None, gt=0, lt=2**31, description="sequences an optimizer step, over all ranks"
    )
    train_micro_batch_size: Int | None = Field(None, gt=0, lt=2**31, description="sequences a forward pass, one rank")
    gradient_accumulation_steps: Int | None = Field(
        None, gt=0, lt=2**31, description="micro-batches an optimizer step; in the trainer, of one process"
    )
    train_sequence_length: Int = _trainers(512, gt=1, lt=2**31, description="tokens a sequence")
    fp16: Fp16 | None = Field(None, description="true, false or a section: fp16 weights and gradients")
    bf16: Bf16 | None = Field(None, description="true, false or a section: bf16 weights and gradients")
    train_loss_scale: float | None = Field(None, ge=0, le=2**64, description="static loss scale for fp16; 0 = dynamic")
    num_train_steps: Int | None = Field(None, gt=0, description="optimizer steps; the trainer's default is 1000")
    num_warmup_steps: Int | None = Field(
        None, ge=0, description="steps over which the learning rate rises; the trainer's default is 0"
    )
    output_dir: str = _trainers("output", min_length=1, description="where the run's results go")
    model_dir: str = _trainers(
        "gpt2-tiny",
        min_length=1,
        description='a Hugging Face GPT-2 folder, or "gpt2-tiny", "gpt2", "gpt2-xl"; a folder that does not exist '
        "means a fresh gpt2 on a GPU, a fresh gpt2-tiny on a CPU",
    )
    dataset_dir: str = _trainers(
        "stdlib",
        min_length=1,
        description='a folder of .txt .md .py .jsonl .parquet or .bin (tokens); "stdlib": the Python standard '
        "library's source",
    )
    optimizer: OptimizerSection | None = Field(None, description="which optimizer; the trainer's is AdamW")
    scheduler: SchedulerSection | None = Field(
        None,
        description="learning rate over time; the trainer's is WarmupCosine",
    )
    gradient_clipping: float | None = Field(
        None, ge=0, description="clip to this global norm; 0 = off; the default is 1.0"
    )
    dataloader_drop_last: bool = Field(False, description="`initialize`'s loader leaves out a last, smaller batch")
    data_types: DataTypes = Field(default_factory=DataTypes, description="")
    zero_optimization: Zero = Field(default_factory=Zero, description="")
    steps_per_print: Annotated[Int | None, BeforeValidator(_never)] = Field(
        None, gt=0, description="every so many steps rank 0 says in a line how training goes; unset: never"
    )
    wall_clock_breakdown: bool = Field(
        False,
        description="that line (without `steps_per_print` one a step) has the milliseconds of forward, backward, step",
    )
    name_nonfinite: bool = Field(
        False,
        description="what is said of inf or NaN in gradients names the first parameter that has them: one more pass "
        "over the gradients of such a step (on a GPU without fp16, a wait in each step)",
    )
    tensorboard: TensorBoard = Field(default_factory=TensorBoard, description="")
    csv_monitor: CsvMonitor = Field(default_factory=CsvMonitor, description="")
    wandb: Wandb = Field(default_factory=Wandb, description="")
    seed: Int = _trainers(0, ge=0, lt=2**63, description="of weights, data order and dropout")
    save_steps: Int = _trainers(500, gt=0, description="a checkpoint every so many steps, and at the end")
    save_total_limit: Int = _trainers(2, gt=0, description="checkpoints kept")
    sample_tokens: Int = _trainers(128, ge=0, description="length of the text generated at the end; 0: none is")
    sample_steps: Int = _trainers(
        0,
        ge=0,
        description="one every so many steps, too: in the log, TensorBoard and `samples.jsonl`; 0: only at the end",
    )
    sample_prompt: str | None = _trainers(
        None, min_length=1, description="what it goes on from; default: the first tokens of the data"
    )
    eval_dataset_dir: str | None = _trainers(
        None, min_length=1, description="a folder like `dataset_dir`, whose loss is measured while training; not in it"
    )
    eval_share: float | None = _trainers(
        None,
        gt=0,
        lt=1,
        description="instead of a folder: such a share of the data, in up to 16 runs spread over it, is not trained on",
    )
    eval_steps: Int | None = _trainers(
        None, gt=0, description="that loss is measured every so many steps, and at the end; default: `save_steps`"
    )
    eval_sequences: Int | None = _trainers(
        None, gt=0, description="on at most so many sequences, spread evenly; default: on all"
    )
    streaming: bool = _trainers(
        False,
        description="the data is read in its order while it is trained on, not tokenized before and not shuffled; "
        "after its end it begins anew",
    )

    _auto: list[str] = PrivateAttr(default_factory=list)  # keys that were "auto"
    _source: dict[str, Any] | None = PrivateAttr(None)  # what it was made of

    def given(self) -> dict[str, Any]:
        """What was set, as a dict: in the caller's own words, where there were any."""
        return self.model_dump(exclude_unset=True) if self._source is None else self._source

    def of_the_trainer(self) -> list[str]:
        """Keys that were set, and are the trainer's alone."""
        return [name for name in type(self).model_fields if name in self.model_fields_set and is_trainers(name)]

    def batch_triple(self) -> tuple[int, int, int]:
        """(train batch, micro-batch, accumulation), after ``resolve_batch``."""
        batch, micro, accumulation = (
            self.train_batch_size,
            self.train_micro_batch_size,
            self.gradient_accumulation_steps,
        )
        if batch is None or micro is None or accumulation is None:
            raise RuntimeError("resolve_batch() has not been called")
        return batch, micro, accumulation


def is_trainers(name: str) -> bool:
    extra = Config.model_fields[name].json_schema_extra
    return isinstance(extra, dict) and "trainer" in extra


def fields(model: type[BaseModel]) -> typing.Iterator[tuple[str, Any, type[BaseModel] | None]]:
    """(name, field, its section if it is one)"""
    for name, field in model.model_fields.items():
        kinds = typing.get_args(field.annotation) if isinstance(field.annotation, types.UnionType) else ()
        section = next(
            (k for k in (field.annotation, *kinds) if isinstance(k, type) and issubclass(k, BaseModel)), None
        )
        yield name, field, section
