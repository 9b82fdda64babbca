"""DeepSpeed's keys that say nothing here: those that only tune are left out, those that cannot be are refused.

A key in a section is written with dots. Keys that only DeepSpeed's own files hold, as it ignores them, are in no table.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from deepfast.errors import ConfigError

_ZERO = """allgather_bucket_size allgather_partitions allgather_sequential compute_grad_norm contiguous_gradients
    elastic_checkpoint enable_sanity_checks gather_16bit_weights_on_model_save ignore_unused_parameters leaf_module
    legacy_stage1 load_from_fp32_weights log_trace_cache_warnings max_live_parameters max_reuse_distance
    memory_efficient_linear mics_hierarchical_params_gather mics_shard_size model_persistence_threshold
    module_granularity_threshold overlap_comm override_module_apply param_persistence_threshold parameter_alignment
    pipeline_loading_checkpoint prefetch_bucket_size reduce_bucket_size reduce_scatter round_robin_gradients
    save_muon_momentum_buffer_in_memory stage3_allgather_sequential stage3_gather_16bit_weights_on_model_save
    stage3_gather_fp16_weights_on_model_save stage3_max_live_parameters stage3_max_reuse_distance
    stage3_model_persistence_threshold stage3_module_granularity_threshold
    stage3_prefetch_bucket_size stage3_use_all_reduce_for_fetch_params sub_group_size
    use_all_reduce_for_fetch_params use_multi_rank_bucket_allreduce zero_hpz_partition_size""".split()
# DeepSpeed keys that tune speed, memory or logging. Accepted, unused.
UNUSED = frozenset(
    """activation_checkpointing aio allgather_bucket_size allgather_size autotuning checkpoint comet comms_logger
    communication_data_type compile data_parallel_size datastates_ckpt disable_allgather disable_python_gc
    dump_state flops_profiler fp32_allreduce gradient_predivide_factor graph_harvesting log_level memory_breakdown
    pipeline prescale_gradients seq_parallel_communication_data_type timers
    use_data_before_expert_parallelism use_node_local_storage vocabulary_size
    zero_allow_untested_optimizer zero_force_ds_cpu_optimizer
    bf16.immediate_grad_update optimizer.legacy_fusion
    optimizer.params.foreach optimizer.params.fused optimizer.params.set_grad_none""".split()
    + [f"zero_optimization.{key}" for key in _ZERO]
)
# Memory only, too; but somebody counts on it. (One public file has it at the top.)
_OFFLOAD = ("offload_optimizer", "offload_param", "cpu_offload", "cpu_offload_param", "cpu_offload_use_pin_memory")
OFFLOAD = frozenset((*_OFFLOAD, *(f"zero_optimization.{key}" for key in _OFFLOAD)))
_NOT_BUILT = "not built yet"
# DeepSpeed keys that would change the result, or that ask for something else altogether.
REFUSED = {
    "amp": "use fp16 or bf16",
    "torch_autocast": "use fp16 or bf16",
    "compression_training": _NOT_BUILT,
    "curriculum_learning": _NOT_BUILT,
    "data_efficiency": _NOT_BUILT,
    "eigenvalue": _NOT_BUILT,
    "elasticity": _NOT_BUILT,
    "expert_parallel": "mixture of experts is not built yet",
    "gradient_allreduce_op": "gradients are averaged over the ranks",
    "hybrid_engine": _NOT_BUILT,
    "managed_gradient_accumulation": "every step() counts a micro-batch",
    "moe": "mixture of experts is not built yet",
    "nebula": _NOT_BUILT,
    "progressive_layer_drop": _NOT_BUILT,
    "quantize_training": _NOT_BUILT,
    "sequence_parallel_size": "sequence parallelism is not built yet",
    "sparse_attention": _NOT_BUILT,
    "sparse_gradients": _NOT_BUILT,
    "tensor_parallel": _NOT_BUILT,
    "weight_quantization": _NOT_BUILT,
    "bf16.bf16_master_weights_and_grads": "masters are fp32",
    "bf16.bf16_optimizer_states": "use optimizer.params.state_dtype",
    "data_types.buffer_dtype": "buffers have the weights' type",
    "data_types.keep_in_fp32_modules": "buffers have the weights' type",
    "data_types.param_dtype": "use fp16 or bf16",
    "fp16.fp16_master_weights_and_grads": "masters are fp32",
    "optimizer.params.eps_inside_sqrt": _NOT_BUILT,
    "optimizer.params.fp32_optimizer_states": "use optimizer.params.state_dtype",
    "optimizer.params.max_coeff": "LAMB is the paper's, without bounds of its ratio",
    "optimizer.params.max_grad_norm": "use gradient_clipping",
    "optimizer.params.min_coeff": "LAMB is the paper's, without bounds of its ratio",
    "zero_optimization.zenflow": _NOT_BUILT,
    "zero_optimization.zero_quantized_gradients": _NOT_BUILT,
    "zero_optimization.zero_quantized_nontrainable_weights": _NOT_BUILT,
    "zero_optimization.zero_quantized_weights": _NOT_BUILT,
    "zero_optimization.zeropp_loco_param": _NOT_BUILT,
}
# What such a key holds where it asks for nothing, if that is not false or empty.
_NOTHING = {
    "gradient_allreduce_op": "mean",
    "managed_gradient_accumulation": True,
    "sequence_parallel_size": 1,
    "optimizer.params.fp32_optimizer_states": True,
}
# Sections that DeepSpeed takes for off unless they are enabled; tensor_parallel is enabled by its size.
_SWITCHED = frozenset(
    """amp curriculum_learning data_efficiency eigenvalue elasticity expert_parallel hybrid_engine
    progressive_layer_drop torch_autocast""".split()
)


def take_out(data: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Takes such keys out of ``data``; returns those that have no effect, and those that ask for offloading.

    Raises:
        ConfigError: for one that would change the result.
    """
    unused, offload = [], []
    for key, holder in list(_keys(data)):
        name = key.rpartition(".")[2]
        if key in REFUSED:
            value = holder.pop(name)
            if not _asks_for_nothing(key, value):
                raise ConfigError(f"{key}: is not supported, and cannot be ignored: {REFUSED[key]}; take it out")
        elif key in OFFLOAD:
            if not off(holder.pop(name)):
                offload.append(key)
            continue
        elif key in UNUSED:
            holder.pop(name)
        else:
            continue
        unused.append(key)
    return unused, offload


_SECTIONS = sorted({key.rpartition(".")[0] for key in (*UNUSED, *OFFLOAD, *REFUSED)})


def _keys(data: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The keys of the sections that have such ones, and the dictionary that holds each."""
    for section in _SECTIONS:
        holder: Any = data
        for part in section.split(".") if section else ():
            holder = holder.get(part) if isinstance(holder, dict) else None
        if isinstance(holder, dict):
            yield from ((f"{section}.{key}" if section else key, holder) for key in holder)


def _asks_for_nothing(key: str, value: Any) -> bool:
    if key == "tensor_parallel" and isinstance(value, dict):
        return value.get("autotp_size", 0) in (0, 1)
    if key in _SWITCHED and isinstance(value, dict):
        return off(value.get("enabled"))
    return value == _NOTHING[key] if key in _NOTHING else off(value)


def off(value: Any) -> bool:
    """Whether a section, or what it consists of, is switched off."""
    if isinstance(value, dict):
        for switch in ("enabled", "shared_parameters"):  # the latter is a compression's
            if switch in value:
                return off(value[switch])
        return value.get("device") == "none" or all(map(off, value.values()))
    return value in (False, None, "", []) or value == ()
