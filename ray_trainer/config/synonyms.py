"""What other trainers call our training settings, so that a user who comes from one is told the name here.

Names of Lightning, Hugging Face Transformers and Accelerate, Composer, DeepSpeed, Keras, torchtitan and
nanoGPT.
"""

_NAMES = {
    "epochs": "max_epochs num_epochs num_train_epochs n_epochs nb_epochs epoch",
    "max_steps": (
        "max_train_steps total_steps num_steps num_training_steps training_steps max_iters steps train_steps"
    ),
    "max_time": "max_train_time max_run_time max_duration time_limit time_budget max_time_s",
    "learning_rate": "lr max_lr base_lr peak_lr initial_lr step_size",
    "batch_size": (
        "per_device_train_batch_size per_gpu_train_batch_size per_device_batch_size micro_batch_size "
        "device_train_microbatch_size train_micro_batch_size_per_gpu local_batch_size "
        "train_batch_size_per_worker bs"
    ),
    "global_batch_size": "train_batch_size global_train_batch_size effective_batch_size total_batch_size",
    "gradient_accumulation_steps": (
        "accumulate_grad_batches grad_accum grad_accum_steps accumulation_steps gradient_accumulation "
        "num_accumulation_steps accum_steps"
    ),
    "optimizer": "optim optimizer_type optimizer_name",
    "weight_decay": "wd l2 l2_reg decay",
    "betas": "adam_betas adam_beta1 adam_beta2 beta1 beta2",
    "max_grad_norm": (
        "gradient_clip_val gradient_clipping clip_grad_norm grad_clip grad_clip_norm clip_norm max_norm "
        "clipnorm gradient_clip clip_grad grad_norm"
    ),
    "lr_scheduler_type": "lr_scheduler scheduler scheduler_type lr_schedule schedule lr_decay_style",
    "warmup_ratio": "warmup warmup_fraction warmup_proportion warmup_pct",
    "warmup_steps": "num_warmup_steps warmup_iters lr_warmup_steps warmup_updates",
    "decay_ratio": "cooldown_ratio decay_fraction",
    "min_lr_ratio": "min_lr eta_min min_learning_rate lr_end end_lr min_lr_rate",
    "precision": "mixed_precision fp16 bf16 dtype torch_dtype half_precision",
    "use_amp": "amp autocast enable_amp",
    "parallelism": (
        "strategy fsdp fully_shard distributed_type distributed_strategy parallel_strategy parallelism_config "
        "data_parallel zero_stage"
    ),
    "compile_mode": "torch_compile compile torch_compile_mode use_compile",
    "compile_fullgraph": "fullgraph torch_compile_fullgraph",
    "compile_dynamic": "dynamic torch_compile_dynamic",
    "random_seed": "seed manual_seed seed_everything rng_seed",
    "deterministic": ("full_determinism use_deterministic_algorithms deterministic_mode deterministic_algorithms"),
    "shuffle": "shuffle_train shuffle_data",
    "drop_last": "dataloader_drop_last drop_last_batch",
    "num_loader_workers": "dataloader_num_workers num_data_workers loader_workers num_dataloader_workers",
    "validation_split": "val_split valid_split val_ratio validation_ratio val_fraction test_size",
    "limit_train_batches": "train_subset_num_batches max_train_batches steps_per_epoch",
    "limit_val_batches": ("limit_eval_batches eval_subset_num_batches eval_iters validation_steps limit_test_batches"),
    "fast_dev_run": "dry_run smoke_test debug",
    "validate_every_n_epochs": ("check_val_every_n_epoch eval_every_n_epochs validation_freq val_every_n_epochs"),
    "validate_every_n_steps": ("eval_steps val_check_interval eval_interval eval_every eval_every_n_steps val_every"),
    "early_stopping_patience": "patience early_stopping es_patience",
    "early_stopping_min_delta": "min_delta early_stopping_threshold",
    "monitor": "metric_for_best_model metric monitor_metric best_metric",
    "mode": "greater_is_better monitor_mode metric_mode",
    "checkpoint_dir": (
        "output_dir default_root_dir save_folder save_dir ckpt_dir out_dir checkpoint_path dirpath checkpoint_folder"
    ),
    "save_every_n_epochs": "every_n_epochs checkpoint_every_n_epochs save_freq",
    "save_every_n_steps": ("save_steps every_n_train_steps checkpoint_interval checkpoint_every save_every"),
    "save_every_minutes": "train_time_interval save_every_n_minutes checkpoint_minutes",
    "keep_last_n": (
        "save_total_limit num_checkpoints_to_keep save_num_checkpoints_to_keep max_to_keep keep_latest_k "
        "num_to_keep keep_last"
    ),
    "keep_best_k": "save_top_k keep_best_only keep_best top_k load_best_model_at_end",
    "on_bad_gradients": "on_nan nan_policy detect_nan skip_nan terminate_on_nan",
    "max_consecutive_bad_steps": "max_bad_steps max_nan_steps",
    "on_spike": "spike_policy loss_spike on_loss_spike skip_spikes",
    "gradient_explosion_threshold": "explosion_threshold max_gradient_norm grad_norm_threshold",
    "on_out_of_memory": "auto_find_batch_size device_train_microbatch_size on_oom",
    "compare_replicas_every_n_steps": "check_replicas_every_n_steps sdc_check_interval check_weight_hash_across_dp",
    "log_every_n_steps": "logging_steps log_every log_interval log_freq log_steps logging_interval",
    "tensorboard": "use_tensorboard tensorboard_dir report_to",
    "run_name": "name experiment_name wandb_run_name",
    "notes": "description comment comments",
}

_IN_THE_CLUSTER = "devices num_nodes world_size num_gpus gpus use_gpu accelerator num_processes"
_IN_THE_MODEL = (
    "vocab_size max_seq_len d_model num_layers num_heads d_ff dropout hidden_size model_type model_name n_layer n_head"
)
_FROM_WHERE = "resume_from resume_from_checkpoint"

TRAINING_SYNONYMS: dict[str, str] = {
    **dict.fromkeys(_IN_THE_CLUSTER.split(), "see num_workers and use_gpu of the cluster's configuration"),
    **dict.fromkeys(_IN_THE_MODEL.split(), "it belongs to the model's own configuration"),
    **dict.fromkeys(_FROM_WHERE.split(), "pass it to train(resume_from=...)"),
    "num_workers": "num_loader_workers load data, the cluster's num_workers train",
    **{name: ours for ours, names in _NAMES.items() for name in names.split()},
}
"""Another trainer's name -> our name, or a sentence on where the setting belongs."""
