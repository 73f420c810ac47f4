"""Every key of a TRL 1.16 GRPO configuration, with TRL's default, and what becomes of it in a recipe.

The keys are the fields of `GRPOConfig` (`transformers.TrainingArguments` included), `ModelConfig`,
`GRPOScriptArguments` and `DatasetMixtureConfig`, which is what `trl grpo --config` reads. A test compares
these tables with the installed TRL, so that a key that a new version brings, or a changed default, is seen.
"""

from __future__ import annotations

from typing import Any

TRL_VERSION = "1.16"

CARRIED: dict[str, Any] = {
    # model
    "model_name_or_path": None,
    "model_revision": "main",
    "model_init_kwargs": None,
    "dtype": "float32",
    "attn_implementation": None,
    "trust_remote_code": False,
    "bf16": None,
    "fp16": False,
    "use_peft": False,
    "lora_r": 16,
    "lora_alpha": 32,
    "lora_dropout": 0.05,
    "lora_target_modules": None,
    # data
    "dataset_name": None,
    "dataset_config": None,
    "dataset_train_split": "train",
    "dataset_test_split": "test",
    "datasets": [],
    "shuffle_dataset": True,
    "data_seed": None,
    # rewards
    "reward_funcs": None,
    "reward_model_name_or_path": None,
    "reward_weights": None,
    "multi_objective_aggregation": "sum_then_normalize",
    # rollouts
    "num_generations": 8,
    "num_generations_eval": None,
    "max_completion_length": 512,
    "temperature": 1.0,
    "use_vllm": False,
    "vllm_mode": "colocate",
    "vllm_server_base_url": None,
    "vllm_server_host": "0.0.0.0",
    "vllm_server_port": 8000,
    "vllm_gpu_memory_utilization": 0.3,
    "vllm_max_model_length": None,
    "vllm_importance_sampling_correction": True,
    "vllm_importance_sampling_mode": "sequence_mask",
    "vllm_importance_sampling_clip_max": 3.0,
    "vllm_importance_sampling_cap": None,
    # batches
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "generation_batch_size": None,
    "steps_per_generation": None,
    "num_iterations": 1,
    "max_steps": -1,
    "num_train_epochs": 3.0,
    "gradient_checkpointing": True,
    # loss
    "loss_type": "dapo",
    "importance_sampling_level": "token",
    "scale_rewards": "group",
    "beta": 0.0,
    "epsilon": 0.2,
    "epsilon_high": None,
    "delta": None,
    "entropy_coef": 0.0,
    "mask_truncated_completions": False,
    # optimiser
    "learning_rate": 1e-6,
    "lr_scheduler_type": "linear",
    "warmup_steps": 0,
    "weight_decay": 0.0,
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "max_grad_norm": 1.0,
    "optim": "adamw_torch_fused",
    # the run
    "seed": 42,
    "output_dir": None,
    "run_name": None,
    "save_strategy": "steps",
    "save_steps": 500,
    "save_total_limit": None,
    "eval_strategy": "no",
    "report_to": "none",
}
"""Keys whose values the recipe has, and TRL's defaults for them."""

Table = dict[str, tuple[Any, str]]


def _table(*groups: tuple[str, dict[str, Any]]) -> Table:
    return {key: (default, reason) for reason, defaults in groups for key, default in defaults.items()}


LEFT_OUT: Table = _table(
    # sampling
    (
        "distributions are not truncated or reshaped in training: the importance correction would be biased",
        {"top_p": 1.0, "top_k": 0, "min_p": None, "repetition_penalty": 1.0},
    ),
    ("requests have temperature, length cap and stop strings only", {"generation_kwargs": None}),
    ("the chat template is called without arguments", {"chat_template_kwargs": None}),
    ("answers cannot be held to a grammar", {"vllm_structured_outputs_regex": None}),
    ("vLLM's own implementation of the model is used", {"vllm_model_impl": "vllm"}),
    ("vLLM keeps its memory while the policy is trained", {"vllm_enable_sleep_mode": False}),
    ("vLLM in the trainer's process runs on one device", {"vllm_tensor_parallel_size": 1}),
    ("the importance ratio has an upper bound only", {"vllm_importance_sampling_clip_min": None}),
    (
        "tools are named in the recipe: tools.use, tools.max_turns",
        {"max_tool_calling_iterations": None},
    ),
    # loss
    (
        "loss_type sapo is not offered",
        {"sapo_temperature_neg": 1.05, "sapo_temperature_pos": 1.0},
    ),
    (
        "loss_type vespo is not offered",
        {"vespo_k_pos": 2.0, "vespo_lambda_pos": 3.0, "vespo_k_neg": 3.0, "vespo_lambda_neg": 2.0},
    ),
    (
        "the reference is the model as it was when the stage began, to its end",
        {"sync_ref_model": False, "ref_model_mixup_alpha": 0.6, "ref_model_sync_steps": 512},
    ),
    ("all tokens of a completion are trained", {"top_entropy_quantile": 1.0}),
    (
        "the weight of the entropy bonus is fixed (loss.entropy)",
        {
            "use_adaptive_entropy": False,
            "entropy_coef_min": 0.0,
            "entropy_coef_max": 1.0,
            "entropy_coef_delta": 0.005,
            "entropy_target": 0.2,
        },
    ),
    ("stale sequences are bounded by loss.importance alone", {"off_policy_mask_threshold": None}),
    (
        "the KL term is always weighted by the ratio, which makes its gradient that of the reverse KL",
        {"use_bias_correction_kl": True},
    ),
    ("the loss has no term for the balance of experts", {"router_aux_loss_coef": None}),
    ("labels are not smoothed", {"label_smoothing_factor": 0.0}),
    ("embeddings get no noise", {"neftune_noise_alpha": None}),
    # model
    ("dropout stays what the model's configuration says", {"disable_dropout": False}),
    ("adapters are plain LoRA on linear layers", {"use_rslora": False, "use_dora": False}),
    ("adapters go on linear layers by name", {"lora_target_parameters": None, "lora_modules_to_save": None}),
    (
        "quantised base weights are not supported",
        {
            "load_in_8bit": False,
            "load_in_4bit": False,
            "bnb_4bit_quant_type": "nf4",
            "use_bnb_nested_quant": False,
            "bnb_4bit_quant_storage": None,
        },
    ),
    (
        "the model is not compiled",
        {"torch_compile": False, "torch_compile_backend": None, "torch_compile_mode": None},
    ),
    ("the model's own kernels are used", {"use_liger_kernel": False, "liger_kernel_config": None}),
    # optimiser
    (
        "the optimiser has learning rate, decay and betas; the rest is the library's default",
        {"adam_epsilon": 1e-8, "optim_args": None, "optim_target_modules": None, "lr_scheduler_kwargs": None},
    ),
    # the run
    (
        "give accelerate's configuration in launch.config_file",
        {
            "fsdp": None,
            "fsdp_config": None,
            "deepspeed": None,
            "parallelism_config": None,
            "accelerator_config": None,
        },
    ),
    (
        "evaluation is a stage of its own and not a part of training: see the stage evaluate",
        {
            "eval_steps": None,
            "eval_delay": 0,
            "eval_on_start": False,
            "load_best_model_at_end": False,
            "metric_for_best_model": None,
            "greater_is_better": None,
        },
    ),
    (
        "nothing is uploaded: the model is in the run folder's models/",
        {
            "push_to_hub": False,
            "hub_token": None,
            "hub_private_repo": None,
            "hub_model_id": None,
            "hub_strategy": "every_save",
            "hub_always_push": False,
            "hub_revision": None,
            "log_completions_hub_repo": None,
        },
    ),
    (
        "trackers take their settings from their own environment variables",
        {
            "project": "huggingface",
            "trackio_space_id": None,
            "trackio_bucket_id": None,
            "trackio_static_space_id": None,
        },
    ),
    ("a run goes on with `posttrain resume RUN`", {"resume_from_checkpoint": None}),
    ("posttrain runs on the accelerator there is, or else on the CPU", {"use_cpu": False}),
    ("a dataset is read whole", {"dataset_streaming": False, "streaming": False}),
    ("name the split to evaluate on in data.eval", {"test_split_size": None}),
    ("float32 products are left to torch's setting", {"tf32": None}),
)
"""Keys without a counterpart, and why."""

UNNEEDED: Table = _table(
    (
        "micro-batches are cut by tokens and packed without padding",
        {
            "pad_to_multiple_of": "auto",
            "auto_find_batch_size": False,
            "average_tokens_across_devices": True,
            "torch_empty_cache_steps": None,
        },
    ),
    ("all columns are kept for the rewards", {"remove_unused_columns": False, "label_names": None}),
    (
        "the engine has weights of its own where they are split",
        {"ds3_gather_for_generation": True},
    ),
    (
        "the engine keeps its own cache and batches continuously",
        {
            "cache_implementation": None,
            "use_cache": False,
            "use_transformers_continuous_batching": False,
            "transformers_continuous_batching_config": None,
            "use_transformers_paged": False,
        },
    ),
    ("logits are computed in float32 always", {"cast_lm_head_to_fp32": False}),
    (
        "replicas are waited for as rollout.server says",
        {"vllm_server_timeout": 240.0, "vllm_group_port": 51216},
    ),
    ("adapters are for causal language models here", {"lora_task_type": "CAUSAL_LM"}),
    ("recomputation has no other settings", {"gradient_checkpointing_kwargs": None}),
    (
        "every step is logged, and every rollout is written to the run folder",
        {
            "logging_strategy": "steps",
            "logging_steps": 10,
            "logging_first_step": False,
            "log_on_each_node": True,
            "logging_nan_inf_filter": True,
            "include_num_input_tokens_seen": "no",
            "log_level": "passive",
            "log_level_replica": "warning",
            "disable_tqdm": None,
            "log_completions": False,
            "log_multimodal": True,
            "num_completions_to_print": None,
            "log_unique_prompts": False,
        },
    ),
    (
        "checkpoints are whole, and resuming is exact",
        {
            "save_only_model": False,
            "save_on_each_node": False,
            "enable_jit_checkpoint": False,
            "ignore_data_skip": False,
            "restore_callback_states_from_checkpoint": False,
            "full_determinism": False,
        },
    ),
    (
        "the evaluate stage samples in batches of rollout.batch_size",
        {
            "per_device_eval_batch_size": 8,
            "prediction_loss_only": False,
            "eval_do_concat_batches": True,
            "eval_use_gather_object": False,
            "eval_accumulation_steps": None,
            "include_for_metrics": [],
            "batch_eval_metrics": False,
            "bf16_full_eval": False,
            "fp16_full_eval": False,
        },
    ),
    (
        "prompts come from a list in memory, in an order of their own",
        {
            "dataloader_drop_last": False,
            "dataloader_num_workers": 0,
            "dataloader_pin_memory": True,
            "dataloader_persistent_workers": False,
            "dataloader_prefetch_factor": None,
            "dataloader_multiprocessing_context": None,
            "dataloader_in_order": True,
            "train_sampling_strategy": "random",
            "length_column_name": "length",
        },
    ),
    (
        "the processes are accelerate's, with posttrain's own time-out",
        {
            "ddp_find_unused_parameters": None,
            "ddp_bucket_cap_mb": None,
            "ddp_broadcast_buffers": None,
            "ddp_static_graph": None,
            "ddp_backend": None,
            "ddp_timeout": 1800,
            "local_rank": -1,
            "ignore_bias_buffers": False,
        },
    ),
    (
        "the stages say what is done",
        {"do_train": False, "do_eval": False, "do_predict": False},
    ),
    ("for debugging TRL", {"debug": "", "skip_memory_metrics": True}),
)
"""Keys that posttrain needs no setting for, and why."""

LAUNCHER: dict[str, str] = {
    "num_processes": "",
    "accelerate_config": "",
    "env": "environment variables are set in the shell; a recipe has none, and no secrets",
    "config_file": "give accelerate's configuration in launch.config_file",
    **dict.fromkeys(
        (
            "mixed_precision",
            "num_machines",
            "machine_rank",
            "main_process_ip",
            "main_process_port",
            "gpu_ids",
        ),
        "belongs into accelerate's configuration, launch.config_file",
    ),
}
"""Keys that TRL's command line takes beside those of its classes; a reason where they are left out."""
