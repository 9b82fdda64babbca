"""Which of DeepSpeed's names there are, by the module in which DeepSpeed has them, and where they are here."""

from __future__ import annotations

_HERE = "deepfast.deepspeed"
_COMM = {
    f"{_HERE}.collectives": "init_distributed destroy_process_group get_rank get_world_size get_local_rank "
    "get_world_group get_all_ranks_from_group barrier monitored_barrier all_reduce reduce broadcast all_gather "
    "all_gather_into_tensor gather scatter reduce_scatter reduce_scatter_tensor all_to_all all_to_all_single "
    "allgather_fn=all_gather_into_tensor reduce_scatter_fn=reduce_scatter_tensor all_gather_object "
    "broadcast_object_list send recv isend irecv new_group get_global_rank",
    "torch.distributed": "ReduceOp P2POp batch_isend_irecv is_available is_initialized",
}
_ZERO = {
    f"{_HERE}.parameters": "Init GatheredParameters ZeroParamStatus ZeroParamType register_external_parameter "
    "unregister_external_parameter",
}
_CHECKPOINTING = {
    f"{_HERE}.recompute": "checkpoint non_reentrant_checkpoint configure is_configured reset set_num_layers "
    "partition_activations_in_checkpoint get_cuda_rng_tracker model_parallel_cuda_manual_seed",
}
_LOGGING = {f"{_HERE}.logs": "logger log_dist log_dist_once print_dist warning_once"}
_LEAVES = {f"{_HERE}.modules": "set_z3_leaf_modules unset_z3_leaf_modules=set_z3_leaf_modules"}
_GRADIENTS = {"deepfast.engine.by_hand": "safe_get_full_grad safe_set_full_grad"}
_LOADER = {f"{_HERE}.loaders": "RepeatingLoader"}
_ATTRIBUTES = {f"{_HERE}.modules": "recursive_getattr recursive_setattr"}

# {module: {where its names are here: the names, or name=the one that it has here}}
NAMES: dict[str, dict[str, str]] = {
    "deepspeed": {
        "deepfast": "initialize add_config_arguments DeepSpeedEngine=Engine",
        f"{_HERE}.collectives": "init_distributed",
        f"{_HERE}.devices": "get_accelerator",
        f"{_HERE}.logs": "logger log_dist",
        f"{_HERE}.surface": "__version__=VERSION",
    },
    "deepspeed.accelerator": {f"{_HERE}.devices": "get_accelerator DeepSpeedAccelerator=Accelerator"},
    "deepspeed.accelerator.real_accelerator": {f"{_HERE}.devices": "get_accelerator"},
    "deepspeed.checkpointing": _CHECKPOINTING,
    "deepspeed.comm": _COMM,
    "deepspeed.comm.comm": _COMM,
    "deepspeed.compression.helper": _ATTRIBUTES,
    "deepspeed.moe.utils": {
        f"{_HERE}.modules": "has_moe_layers is_moe_param is_moe_param_group configure_moe_param_groups "
        "split_params_into_different_moe_groups_for_optimizer split_params_into_shared_and_expert_params",
    },
    "deepspeed.ops.adagrad": {f"{_HERE}.optimizers": "DeepSpeedCPUAdagrad"},
    "deepspeed.ops.adam": {f"{_HERE}.optimizers": "FusedAdam DeepSpeedCPUAdam"},
    "deepspeed.ops.lamb": {f"{_HERE}.optimizers": "FusedLamb"},
    "deepspeed.ops.lion": {f"{_HERE}.optimizers": "FusedLion DeepSpeedCPULion"},
    "deepspeed.runtime.activation_checkpointing.checkpointing": _CHECKPOINTING,
    "deepspeed.runtime.config": {"deepfast.errors": "DeepSpeedConfigError=ConfigError"},
    "deepspeed.runtime.dataloader": _LOADER,
    "deepspeed.runtime.engine": {"deepfast": "DeepSpeedEngine=Engine"},
    "deepspeed.runtime.utils": {f"{_HERE}.logs": "see_memory_usage", "torch.nn.utils": "clip_grad_norm_"},
    "deepspeed.runtime.zero": _ZERO,
    "deepspeed.runtime.zero.partition_parameters": _ZERO,
    "deepspeed.utils": {
        **_GRADIENTS,
        **_LOADER,
        f"{_HERE}.logs": f"{_LOGGING[f'{_HERE}.logs']} see_memory_usage",
        f"{_HERE}.modules": f"{_LEAVES[f'{_HERE}.modules']} {_ATTRIBUTES[f'{_HERE}.modules']}",
    },
    "deepspeed.utils.groups": {
        f"{_HERE}.parallel": "_get_data_parallel_group _get_data_parallel_rank _get_data_parallel_world_size "
        "get_data_parallel_group=_get_data_parallel_group get_data_parallel_rank=_get_data_parallel_rank "
        "get_data_parallel_world_size=_get_data_parallel_world_size _get_data_parallel_group_ranks "
        "_get_broadcast_src_rank _get_sequence_data_parallel_group=_get_data_parallel_group "
        "_get_sequence_data_parallel_rank=_get_data_parallel_rank "
        "_get_sequence_data_parallel_world_size=_get_data_parallel_world_size "
        "_get_sequence_parallel_rank=zero _get_sequence_parallel_world_size=one "
        "_get_model_parallel_world_size=one get_model_parallel_rank=zero get_model_parallel_world_size=one "
        "get_tensor_model_parallel_rank=zero get_tensor_model_parallel_world_size=one",
    },
    "deepspeed.utils.logging": _LOGGING,
    "deepspeed.utils.tensor_fragment": _GRADIENTS,
    "deepspeed.utils.z3_leaf_module": _LEAVES,
    "deepspeed.utils.zero_to_fp32": {
        f"{_HERE}.zero_to_fp32": "get_fp32_state_dict_from_zero_checkpoint load_state_dict_from_zero_checkpoint "
        "convert_zero_checkpoint_to_fp32_state_dict",
    },
    "deepspeed.zero": _ZERO,
}

# {a name that is not there, or what it begins with: what to do}; the longest that fits is taken
INSTEAD: dict[str, str] = {
    "deepspeed": "leave it out, or run this script with DeepSpeed",
    "deepspeed.OnDevice": "build the model under torch.device(...)",
    "deepspeed.Pipeline": "models are not cut into stages; run this script with DeepSpeed",
    "deepspeed.autotuning": "set the batch sizes yourself",
    "deepspeed.comm": "call torch.distributed's, which the engine uses too",
    "deepspeed.compression": "compress the model with torch.ao, or run this script with DeepSpeed",
    "deepspeed.inference": "call the module itself, engine.module",
    "deepspeed.init_inference": "call the module itself, engine.module",
    "deepspeed.moe": "there is no mixture of experts; run this script with DeepSpeed",
    "deepspeed.ops": "the optimizers are deepfast's; other operations are torch's",
    "deepspeed.pipe": "models are not cut into stages; run this script with DeepSpeed",
    "deepspeed.profiling": "use torch.profiler",
    "deepspeed.runtime.fp16.onebit": "use AdamW or LAMB: gradients are not compressed",
    "deepspeed.runtime.lr_schedules": "set the scheduler in the configuration, or use torch.optim.lr_scheduler",
    "deepspeed.runtime.pipe": "models are not cut into stages; run this script with DeepSpeed",
    "deepspeed.tp_model_init": "models are not split over ranks; run this script with DeepSpeed",
    "deepspeed.utils.safe_get": "save_checkpoint and zero_to_fp32 give whole fp32 weights; safe_get_full_grad is there",
    "deepspeed.utils.safe_set": "load_checkpoint sets whole fp32 weights; safe_set_full_grad is there",
    "deepspeed.utils.timer": "use time.perf_counter or torch.profiler",
}
