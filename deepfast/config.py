"""The configuration: one schema, two spellings.

DeepSpeed's nested keys and the flat ones may be mixed; where both spell the same thing they must agree. Every unknown
key, at any depth, is an error that names it and the nearest known one. DeepSpeed keys that only tune speed or memory
are accepted and logged once as unused; keys that would change the result are errors.
"""

from __future__ import annotations

import difflib
import json
import logging
import os
import re
import types
import typing
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, Strict, ValidationError
from pydantic_core import PydanticUndefined

from deepfast.errors import ConfigError

log = logging.getLogger("deepfast")

# DeepSpeed keys that tune speed, memory or logging, at the top level. Accepted, unused.
UNUSED = frozenset(
    """activation_checkpointing aio allgather_bucket_size autotuning checkpoint comms_logger communication_data_type
    csv_monitor disable_allgather dump_state flops_profiler fp32_allreduce memory_breakdown
    prescale_gradients steps_per_print tensorboard use_node_local_storage wall_clock_breakdown wandb
    zero_allow_untested_optimizer zero_force_ds_cpu_optimizer compile timers""".split()
)
# DeepSpeed keys that would change the result, or that ask for something else altogether.
REFUSED = {
    "amp": "use fp16 or bf16",
    "torch_autocast": "use fp16 or bf16",
    "compression_training": "not built yet",
    "curriculum_learning": "not built yet",
    "data_efficiency": "not built yet",
    "eigenvalue": "not built yet",
    "elasticity": "not built yet",
    "hybrid_engine": "not built yet",
    "moe": "mixture of experts is not built yet",
    "pipeline": "pipeline parallelism is not built yet",
    "progressive_layer_drop": "not built yet",
    "sparse_attention": "not built yet",
    "sparse_gradients": "not built yet",
    "tensor_parallel": "not built yet",
}
_ZERO_UNUSED = frozenset(
    """allgather_bucket_size allgather_partitions contiguous_gradients elastic_checkpoint
    gather_16bit_weights_on_model_save ignore_unused_parameters load_from_fp32_weights max_live_parameters
    max_reuse_distance model_persistence_threshold overlap_comm param_persistence_threshold prefetch_bucket_size
    reduce_bucket_size reduce_scatter round_robin_gradients stage3_gather_16bit_weights_on_model_save
    stage3_max_live_parameters stage3_max_reuse_distance stage3_model_persistence_threshold
    stage3_param_persistence_threshold stage3_prefetch_bucket_size stage3_module_granularity_threshold
    sub_group_size""".split()
)
_ZERO_REFUSED = {
    "offload_optimizer": "offloading is not built yet",
    "offload_param": "offloading is not built yet",
    "cpu_offload": "offloading is not built yet",
    "zero_quantized_weights": "not built yet",
    "zero_quantized_gradients": "not built yet",
    "zero_hpz_partition_size": "not built yet",
}


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class Fp16(Section):
    enabled: bool = Field(False, description="train with fp16 weights and gradients (`fp16: true` for short)")
    initial_scale_power: int = Field(16, ge=0, le=24, description="a dynamic scale starts at 2 to this power")
    loss_scale_window: int = Field(1000, gt=0, lt=2**24, description="clean steps until a dynamic scale doubles")
    hysteresis: int = Field(2, gt=0, lt=2**24, description="overflows until a dynamic scale halves")
    consecutive_hysteresis: bool = Field(False, description="a clean step refills the hysteresis")
    min_loss_scale: float = Field(1.0, gt=0, le=2**24, description="lower bound of a dynamic scale")
    auto_cast: bool = Field(True, description="floating-point inputs are cast to the compute type")
    fp16_master_weights_and_grads: Literal[False] = Field(False, description="masters are fp32")


class Bf16(Section):
    enabled: bool = Field(False, description="train with bf16 weights and gradients (`bf16: true` for short)")


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
    bias_correction: bool = Field(True, description="must be true")
    momentum: float = Field(0.0, ge=0, description="of SGD")
    dampening: float = Field(0.0, description="of SGD's momentum")
    nesterov: bool = Field(False, description="SGD with Nesterov momentum")
    lr_decay: float = Field(0.0, ge=0, description="of Adagrad")
    initial_accumulator_value: float = Field(0.0, ge=0, description="of Adagrad")


# type -> what its params may hold
_ADAM = "lr betas eps weight_decay amsgrad adam_w_mode torch_adam bias_correction".split()
OPTIMIZER_PARAMS = {
    "AdamW": _ADAM,
    "Adam": _ADAM,
    "SGD": "lr momentum dampening weight_decay nesterov".split(),
    "Lion": "lr betas weight_decay".split(),
    "LAMB": "lr betas eps weight_decay".split(),
    "Adagrad": "lr lr_decay weight_decay initial_accumulator_value eps".split(),
}


class OptimizerSection(Section):
    type: Literal["AdamW", "Adam", "SGD", "Lion", "LAMB", "Adagrad"] = Field(
        "AdamW", description="AdamW (and DeepSpeed's Adam is one), SGD, Lion, LAMB (the paper's) or Adagrad"
    )
    params: OptimizerParams = Field(default_factory=OptimizerParams, description="its hyperparameters")

    def chosen(self) -> tuple[str, dict[str, Any]]:
        """The class's name in :mod:`deepfast.optim` and its arguments; DeepSpeed's default is no weight decay."""
        ours = set(OPTIMIZER_PARAMS[self.type]) - {"adam_w_mode", "torch_adam", "bias_correction"}
        arguments = self.params.model_dump(include=ours, exclude_none=True)
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
    stage: Literal[0, 1, 2, 3] = Field(0, description="not built yet: every rank keeps the whole state")


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
    seed: int = Field(0, ge=0, lt=2**63, description="of weights, data order and dropout")
    save_steps: int = Field(500, gt=0, description="a checkpoint every so many steps, and at the end")
    save_total_limit: int = Field(2, gt=0, description="checkpoints kept")
    sample_tokens: int = Field(128, ge=0, description="length of the text generated at the end")

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


def trainer_defaults(config: Config) -> Config:
    """A copy in which what ``deepfast.initialize`` leaves to the script has the trainer's values."""
    config = config.model_copy(deep=True)
    config.num_train_steps = config.num_train_steps or 1000
    config.num_warmup_steps = config.num_warmup_steps or 0
    if config.gradient_clipping is None:
        config.gradient_clipping = 1.0
    config.optimizer = config.optimizer or OptimizerSection()
    params = config.optimizer.params
    params.lr = params.lr or 5e-4
    if config.optimizer.type in ("AdamW", "Adam"):
        params.betas = params.betas or (0.9, 0.95)
    if params.weight_decay is None:
        params.weight_decay = 0.1
    if config.num_warmup_steps > config.num_train_steps:
        log.warning(
            "num_warmup_steps=%d is more than num_train_steps=%d: the learning rate never reaches its peak",
            config.num_warmup_steps,
            config.num_train_steps,
        )
    config.scheduler = config.scheduler or SchedulerSection(type="WarmupCosine")
    return config


# flat key -> where DeepSpeed keeps the same thing
SPELLINGS = {
    "train_micro_batch_size": ("train_micro_batch_size_per_gpu",),
    "train_loss_scale": ("fp16", "loss_scale"),
    "num_warmup_steps": ("scheduler", "params", "warmup_num_steps"),
    "num_train_steps": ("scheduler", "params", "total_num_steps"),
}


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The JSON object in a file. Raises ConfigError, with line and column where it is no JSON."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}: not JSON: line {error.lineno}, column {error.colno}: {error.msg}") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets nested as deep
        raise ConfigError(f"{path}: JSON that cannot be read: {error}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: a JSON object was expected, got {_kind(data)}")
    return data


def load(data: dict[str, Any]) -> Config:
    """Checks a configuration in either spelling.

    Raises:
        ConfigError: with one line that names the key, what it holds and what it may hold.
    """
    data = _without_auto(data)
    unused = []
    for key in list(data):
        if key in REFUSED and data[key] not in (False, None, {}):
            _refuse(key, data.pop(key), REFUSED[key])
        elif key in REFUSED or key in UNUSED:
            data.pop(key)
            unused.append(key)
    zero = data.get("zero_optimization")
    if isinstance(zero, dict):
        for key in list(zero):
            if key in _ZERO_REFUSED:
                _refuse(f"zero_optimization.{key}", zero.pop(key), _ZERO_REFUSED[key])
            elif key in _ZERO_UNUSED:
                zero.pop(key)
                unused.append(f"zero_optimization.{key}")
        if zero.get("stage"):
            unused.append("zero_optimization.stage")
    for key in ("fp16", "bf16"):
        if isinstance(data.get(key), bool):
            data[key] = {"enabled": data[key]}
        elif key in data and not isinstance(data[key], dict | None):
            raise ConfigError(f"{key}={json.dumps(data[key], default=str)}: it must be true, false or an object")
    spelled = _unify(data)
    try:
        config = Config.model_validate(data)
    except ValidationError as error:
        raise ConfigError(_one_line(error, spelled)) from None
    if unused:
        log.warning("configuration keys without effect here: %s", ", ".join(unused))
    _check(config)
    return config


def resolve_batch(config: Config, world: int, *, one_process: bool = False) -> None:
    """Fills in the batch triple: train_batch_size = micro-batch · accumulation · world. Any two give the third.

    Args:
        world: number of data-parallel ranks.
        one_process: ``gradient_accumulation_steps`` was written for one process: divide it by the world, so that the
            same file trains the same global batch on any number of ranks.

    Raises:
        ConfigError: for a triple that does not multiply.
    """
    batch, micro, accumulation = (
        config.train_batch_size,
        config.train_micro_batch_size,
        config.gradient_accumulation_steps,
    )
    if one_process and world > 1 and accumulation and not (batch and micro and batch == micro * accumulation * world):
        if accumulation % world:
            raise ConfigError(
                f"gradient_accumulation_steps={accumulation} cannot be divided among {world} ranks: use a multiple"
            )
        log.info("gradient_accumulation_steps=%d over %d ranks: %d each", accumulation, world, accumulation // world)
        accumulation //= world
    if micro is None and batch is not None:
        accumulation = accumulation or 1
        micro = _share(batch, accumulation * world, f"gradient_accumulation_steps {accumulation} x ranks {world}")
    if micro is None:
        raise ConfigError("train_batch_size or train_micro_batch_size is missing")
    if accumulation is None:
        accumulation = 1 if batch is None else _share(batch, micro * world, f"micro-batch {micro} x ranks {world}")
    batch = micro * accumulation * world if batch is None else batch
    if batch != micro * accumulation * world:
        raise ConfigError(
            f"train_batch_size={batch}, but micro-batch {micro} x gradient_accumulation_steps {accumulation} x ranks "
            f"{world} = {micro * accumulation * world}: change one of them, or leave one out"
        )
    config.train_batch_size, config.train_micro_batch_size, config.gradient_accumulation_steps = (
        batch,
        micro,
        accumulation,
    )


def _share(batch: int, divisor: int, what: str) -> int:
    if batch % divisor:
        raise ConfigError(f"train_batch_size={batch} cannot be divided by {what} = {divisor}: use a multiple")
    return batch // divisor


def _without_auto(value: Any) -> Any:
    """A copy in which "auto" and null mean unset."""
    if isinstance(value, dict):
        return {k: _without_auto(v) for k, v in value.items() if v is not None and v != "auto"}
    return value


def _refuse(key: str, value: Any, why: str) -> None:
    off = value in (False, None, {}) or (
        isinstance(value, dict) and (value.get("enabled") is False or value.get("device") == "none")
    )
    if not off:
        raise ConfigError(f"{key}: is not supported, and cannot be ignored: {why}; take it out")


def _unify(data: dict[str, Any]) -> dict[str, str]:
    """Moves DeepSpeed's spellings to the flat ones; the two may not contradict each other. Returns what was moved."""
    spelled = {}
    for flat, nested in SPELLINGS.items():
        holder: Any = data
        for part in nested[:-1]:
            holder = holder.get(part) if isinstance(holder, dict) else None
        if not isinstance(holder, dict) or nested[-1] not in holder:
            continue
        value = holder.pop(nested[-1])
        if flat in data and data[flat] != value:
            raise ConfigError(f"{flat}={data[flat]!r} contradicts {'.'.join(nested)}={value!r}: keep one of them")
        if flat not in data:
            data[flat] = value
            spelled[flat] = ".".join(nested)
    return spelled


def _check(config: Config) -> None:
    for name, section in (("fp16", config.fp16), ("bf16", config.bf16)):
        if section and "enabled" not in section.model_fields_set:
            log.info('%s: a section without "enabled": true is off, as in DeepSpeed', name)
    if config.train_loss_scale and config.train_loss_scale < 2**-64:
        raise ConfigError(f"train_loss_scale={config.train_loss_scale}: too small for fp32; 0 means dynamic")
    for name in ("output_dir", "model_dir", "dataset_dir"):
        if "\0" in getattr(config, name):
            raise ConfigError(f"{name}: holds a NUL character")
    if config.fp16 and config.fp16.enabled and config.bf16 and config.bf16.enabled:
        raise ConfigError("fp16 and bf16 are both enabled: choose one")
    if config.optimizer is None:
        return
    params = config.optimizer.params
    known = OPTIMIZER_PARAMS[config.optimizer.type]
    for name in sorted(params.model_fields_set.difference(known)):
        raise ConfigError(f"optimizer.params.{name}: {config.optimizer.type} has none: it takes {', '.join(known)}")
    if not params.bias_correction:
        raise ConfigError("optimizer.params.bias_correction=false is not built yet: take it out")
    if params.nesterov and not (params.momentum and params.dampening == 0):
        raise ConfigError("optimizer.params.nesterov=true needs a momentum, and no dampening")
    for i, beta in enumerate(params.betas or ()):
        if not 0 <= beta < 1:
            raise ConfigError(f"optimizer.params.betas.{i}={beta} must lie in [0, 1)")


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def _one_line(error: ValidationError, spelled: dict[str, str]) -> str:
    """The first fault: which key, what it holds, what it may hold."""
    fault = error.errors()[0]
    loc = [str(part) for part in fault["loc"]]
    key, value = ".".join(loc), fault["input"]
    key = spelled.get(key, key)
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    if fault["type"] == "extra_forbidden":
        known = _known_keys(loc[:-1])
        near = difflib.get_close_matches(loc[-1], known, n=1, cutoff=0.6) or [k for k in known if k in loc[-1]]
        hint = f"did you mean {near[0]!r}?" if near else f"known are: {', '.join(sorted(known))}"
        return f"{key!r}: unknown key: {hint}{more}"
    if fault["type"] == "missing":
        return f"{key}: it is required{more}"
    shown = json.dumps(value, default=str)
    message = fault["msg"].replace("Input should be", "it must be").replace("String should", "it should")
    message = message.replace("a valid tuple", "a list")
    message = re.sub(r"a valid (?=i)", "an ", message).replace("a valid ", "a ")
    message = re.sub(r"a dictionary( or instance of \w+)?", "an object", message)
    return f"{key}={shown if len(shown) < 60 else _kind(value)}: {message}{more}"


def _fields(model: type[BaseModel]) -> typing.Iterator[tuple[str, Any, type[BaseModel] | None]]:
    """(name, field, its section if it is one)"""
    for name, field in model.model_fields.items():
        kinds = typing.get_args(field.annotation) if isinstance(field.annotation, types.UnionType) else ()
        section = next(
            (k for k in (field.annotation, *kinds) if isinstance(k, type) and issubclass(k, BaseModel)), None
        )
        yield name, field, section


def _known_keys(path: list[str]) -> list[str]:
    """The keys a section may hold, the commonest first."""
    model: type[BaseModel] = Config
    for part in path:
        model = next((s for name, _, s in _fields(model) if name == part and s), model)
    nested = [spelling[-1] for spelling in SPELLINGS.values() if list(spelling[:-1]) == path]
    extra = {(): [*UNUSED, *REFUSED], ("zero_optimization",): [*_ZERO_UNUSED, *_ZERO_REFUSED]}
    return [*model.model_fields, *nested, *extra.get(tuple(path), [])]


def table() -> str:
    """The schema as a Markdown table (README.md holds it)."""
    lines = ["| key | default | meaning |", "|---|---|---|"]

    def add(model: type[BaseModel], prefix: str) -> None:
        for name, field, section in _fields(model):
            key = prefix + name
            same = [".".join(SPELLINGS[key])] if key in SPELLINGS else []
            if section and not field.description:
                add(section, key + ".")
                continue
            default = field.get_default(call_default_factory=True)
            shown = "" if default is None or default is PydanticUndefined or section else f"`{json.dumps(default)}`"
            also = "".join(f" = `{other}`" for other in same)
            lines.append(f"| `{key}`{also} | {shown} | {field.description} |")
            if section:
                add(section, key + ".")

    add(Config, "")
    return "\n".join(lines)
