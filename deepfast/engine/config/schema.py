"""The schema: every key, its type, its default and what it means."""

from __future__ import annotations

import math
import types
import typing
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, Strict

from deepfast.optimizers import OPTIMIZERS


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class Fp16(Section):
    enabled: bool = Field(False, description="train with fp16 weights and gradients (`fp16: true` for short)")
    initial_scale_power: int = Field(16, ge=0, le=24, description="a dynamic scale starts at 2 to this power")
    loss_scale_window: int = Field(1000, gt=0, lt=2**24, description="clean steps until a dynamic scale doubles")
    hysteresis: int = Field(2, gt=0, lt=2**24, description="overflows until a dynamic scale halves")
    consecutive_hysteresis: bool = Field(False, description="a clean step refills the hysteresis")
    min_loss_scale: float = Field(1.0, gt=0, le=2**24, description="lower bound of a dynamic scale")
    max_skips_at_minimum: int = Field(
        20, gt=0, lt=2**31, description="so many skipped steps in a row at the lowest or a static scale are an error"
    )
    auto_cast: bool = Field(True, description="floating-point inputs are cast to the compute type")
    fp16_master_weights_and_grads: Literal[False] = Field(False, description="masters are fp32")


class Bf16(Section):
    enabled: bool = Field(False, description="train with bf16 weights and gradients (`bf16: true` for short)")


_MomentForm = Literal["fp32", "bf16", "param", "int8"]


class OptimizerParams(Section):
    lr: float | None = Field(None, gt=0, le=1e6, description="peak learning rate; the trainer's default is 5e-4")
    betas: Annotated[tuple[float, float], Strict(False)] | None = Field(
        None, description="decay rates of the moments; the trainer's are [0.9, 0.95] for AdamW"
    )
    eps: float | None = Field(None, gt=0, description="added to the denominator; each optimizer has its own default")
    weight_decay: float | None = Field(None, ge=0, description="the trainer's is 0.1, and on matrices only")
    amsgrad: bool = Field(False, description="AMSGrad variant")
    adam_w_mode: bool = Field(True, description="false, with type Adam: weight decay goes through the gradient")
    torch_adam: bool = Field(False, description="unused")
    bias_correction: bool = Field(True, description="false: moments are not corrected for their bias")
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


# type -> what its params may hold; DeepSpeed has more words for Adam
_DEEPSPEEDS = "adam_w_mode torch_adam".split()
_FORMS = "master state_dtype rounding".split()
OPTIMIZER_PARAMS = {
    name: [*known.split(), *(_DEEPSPEEDS if name in ("AdamW", "Adam") else ()), *_FORMS]
    for name, known in OPTIMIZERS.items()
}
if TYPE_CHECKING:
    OptimizerName = str
else:
    OptimizerName = Literal[tuple(OPTIMIZERS)]


class OptimizerSection(Section):
    type: OptimizerName = Field(
        "AdamW", description=f"{', '.join(OPTIMIZERS)}; DeepSpeed's Adam is AdamW, LAMB the paper's"
    )
    params: OptimizerParams = Field(default_factory=OptimizerParams, description="its hyperparameters")

    def chosen(self) -> tuple[str, dict[str, Any]]:
        """The class's name in :mod:`deepfast.optim` and its arguments; DeepSpeed's default is no weight decay."""
        ours = {*OPTIMIZERS[self.type].split(), *_FORMS}
        arguments = self.params.model_dump(include=ours, exclude_unset=True, exclude_none=True)
        name = "AdamW" if self.type == "Adam" and self.params.adam_w_mode else self.type
        return name, {"weight_decay": 0.0, **arguments}


class SchedulerParams(Section):
    warmup_min_lr: float = Field(0.0, ge=0, description="learning rate at the start of the warm-up")
    warmup_max_lr: float | None = Field(None, gt=0, description="after it; default: the optimizer's lr")
    warmup_type: Literal["log", "linear"] = Field("log", description="shape of the warm-up")
    cos_min_ratio: float = Field(0.0001, ge=0, le=1, description="WarmupCosineLR ends at this share of the peak")
    warmup_min_ratio: float = Field(0.0, ge=0, le=1, description="WarmupCosineLR starts at this share of the peak")


class SchedulerSection(Section):
    type: Literal["WarmupLR", "WarmupDecayLR", "WarmupCosineLR", "WarmupCosine"] = Field(
        description="DeepSpeed's (after the warm-up constant, linear, cosine), or the trainer's: a linear warm-up from "
        "the first step on, then a cosine to a tenth"
    )
    params: SchedulerParams = Field(default_factory=SchedulerParams, description="its settings")


class DataTypes(Section):
    grad_accum_dtype: Literal["fp32"] | None = Field(None, description="micro-batches are summed in fp32")


class Zero(Section):
    stage: Literal[0, 1, 2, 3] = Field(
        0,
        description="1, 2: each rank keeps a part of the optimizer's state and of the gradients' sums; 3 runs as 2",
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


class Config(Section):
    """What a run is; see ``load``."""

    train_batch_size: int | None = Field(
        None, gt=0, lt=2**31, description="sequences an optimizer step, over all ranks"
    )
    train_micro_batch_size: int | None = Field(None, gt=0, lt=2**31, description="sequences a forward pass, one rank")
    gradient_accumulation_steps: int | None = Field(
        None, gt=0, lt=2**31, description="micro-batches an optimizer step; in the trainer, of one process"
    )
    train_sequence_length: int = Field(512, gt=1, lt=2**31, description="tokens a sequence")
    fp16: Fp16 | None = Field(None, description="true, false or a section: fp16 weights and gradients")
    bf16: Bf16 | None = Field(None, description="true, false or a section: bf16 weights and gradients")
    train_loss_scale: float | None = Field(None, ge=0, le=2**64, description="static loss scale for fp16; 0 = dynamic")
    num_train_steps: int | None = Field(None, gt=0, description="optimizer steps; the trainer's default is 1000")
    num_warmup_steps: int | None = Field(
        None, ge=0, description="steps over which the learning rate rises; the trainer's default is 0"
    )
    output_dir: str = Field("output", min_length=1, description="where the run's results go")
    model_dir: str = Field(
        "gpt2-tiny",
        min_length=1,
        description='a Hugging Face GPT-2 folder, or "gpt2-tiny", "gpt2", "gpt2-xl"; a folder that does not exist '
        "means a fresh gpt2 on a GPU, a fresh gpt2-tiny on a CPU",
    )
    dataset_dir: str = Field(
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
        None, ge=0, description="clip to this global norm; 0 = off; the trainer's default is 1.0"
    )
    dataloader_drop_last: bool = Field(False, description="`initialize`'s loader leaves out a last, smaller batch")
    data_types: DataTypes = Field(default_factory=DataTypes, description="")
    zero_optimization: Zero = Field(default_factory=Zero, description="")
    steps_per_print: Annotated[int | None, BeforeValidator(_never)] = Field(
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
    seed: int = Field(0, ge=0, lt=2**63, description="of weights, data order and dropout")
    save_steps: int = Field(500, gt=0, description="a checkpoint every so many steps, and at the end")
    save_total_limit: int = Field(2, gt=0, description="checkpoints kept")
    sample_tokens: int = Field(128, ge=0, description="length of the text generated at the end")

    def given(self) -> dict[str, Any]:
        """What was set, as a dict."""
        return self.model_dump(exclude_unset=True)

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


def fields(model: type[BaseModel]) -> typing.Iterator[tuple[str, Any, type[BaseModel] | None]]:
    """(name, field, its section if it is one)"""
    for name, field in model.model_fields.items():
        kinds = typing.get_args(field.annotation) if isinstance(field.annotation, types.UnionType) else ()
        section = next(
            (k for k in (field.annotation, *kinds) if isinstance(k, type) and issubclass(k, BaseModel)), None
        )
        yield name, field, section
