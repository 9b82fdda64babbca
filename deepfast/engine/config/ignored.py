"""DeepSpeed's keys that say nothing here: those that only tune are left out, those that cannot be are refused."""

from __future__ import annotations

from typing import Any

from deepfast.errors import ConfigError

# DeepSpeed keys that tune speed, memory or logging, at the top level. Accepted, unused.
UNUSED = frozenset(
    """activation_checkpointing aio allgather_bucket_size autotuning checkpoint comms_logger communication_data_type
    disable_allgather dump_state flops_profiler fp32_allreduce memory_breakdown
    prescale_gradients use_node_local_storage
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
ZERO_UNUSED = frozenset(
    """allgather_bucket_size allgather_partitions contiguous_gradients elastic_checkpoint
    gather_16bit_weights_on_model_save ignore_unused_parameters load_from_fp32_weights max_live_parameters
    max_reuse_distance model_persistence_threshold overlap_comm param_persistence_threshold prefetch_bucket_size
    reduce_bucket_size reduce_scatter round_robin_gradients stage3_gather_16bit_weights_on_model_save
    stage3_max_live_parameters stage3_max_reuse_distance stage3_model_persistence_threshold
    stage3_param_persistence_threshold stage3_prefetch_bucket_size stage3_module_granularity_threshold
    sub_group_size""".split()
)
ZERO_REFUSED = {
    "offload_optimizer": "offloading is not built yet",
    "offload_param": "offloading is not built yet",
    "cpu_offload": "offloading is not built yet",
    "zero_quantized_weights": "not built yet",
    "zero_quantized_gradients": "not built yet",
    "zero_hpz_partition_size": "not built yet",
}


def take_out(data: dict[str, Any]) -> list[str]:
    """Takes such keys out of ``data`` and returns those that have no effect.

    Raises:
        ConfigError: for one that would change the result.
    """
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
            if key in ZERO_REFUSED:
                _refuse(f"zero_optimization.{key}", zero.pop(key), ZERO_REFUSED[key])
            elif key in ZERO_UNUSED:
                zero.pop(key)
                unused.append(f"zero_optimization.{key}")
    return unused


def _refuse(key: str, value: Any, why: str) -> None:
    off = value in (False, None, {}) or (
        isinstance(value, dict) and (value.get("enabled") is False or value.get("device") == "none")
    )
    if not off:
        raise ConfigError(f"{key}: is not supported, and cannot be ignored: {why}; take it out")
