"""The table of settings of other trainers: what each is here, why it is not needed, or what to do instead.

Letters: H Transformers, S ms-swift, F FlagEmbedding, T Tevatron, B Sentence Transformers, D DeepSpeed, M Megatron-LM.
"""

import difflib

from megatron_embed.config.foreign_word import ForeignWord, key, unneeded, unsupported

FOREIGN_WORDS: dict[str, tuple[ForeignWord, ...]] = {
    "Model": (
        key("model_name_or_path model.path model.id model.pretrained "
            "model.name model.name_or_path model model_name model_id model_id_or_path base_model "
            "pretrained_model_name_or_path model_path load ckpt_dir hf_model pretrained_model_cfg", "HSFTBM",
            "model.path", "a directory or a hub name"),
        key("task_type task problem_type", "SF", "task", "embedding or reranker"),
        unneeded("model_type template config_name tokenizer_name tokenizer_name_or_path tokenizer use_chat_template "
                 "use_slow_tokenizer architecture", "HSFT", "family and tokenizer are those of the directory at "
                 "model.path"),
        unsupported("trust_remote_code", "HF", "no code of a model directory is run; docs/families.md lists the "
                    "families of models"),
        unneeded("cache_dir cache_path dataset_cache_dir model_revision load_from_cache_file download_mode "
                 "overwrite_cache", "HSFT", "the cache of the hub is where HF_HOME says; for another revision, "
                 "download it and give the directory as model.path"),
        unneeded("use_hf token hub_token use_auth_token hf_token use_modelscope", "HSF", "models and data sets come "
                 "from the Hugging Face hub, with HF_TOKEN, or from directories"),
        key("attn_implementation attn_impl use_flash_attn flash_attn flash_attention use_flash_attention_2 "
            "attention_backend", "HSFTM", "model.attention", "auto, the default, takes flash attention in half "
            "precision on a GPU"),
        key("torch_dtype dtype mixed_precision precision params_dtype", "HSFTBM", "model.dtype", "auto, float32 or "
            "bfloat16; the optimizer keeps float32 parameters either way"),
        key("bf16 use_bf16 bf16.enabled bf16_full_eval", "HSFTBDM", "model.dtype", "bfloat16; auto takes it where the "
            "hardware has it"),
        key("fp16 use_fp16 fp16.enabled half amp use_amp", "HFTBD", "model.dtype", "bfloat16, which needs no loss "
            "scaling; float16 is not supported"),
        unneeded("tf32 fp16_opt_level fp16_full_eval half_precision_backend lora_dtype loss_scaling "
                 "initial_scale_power loss_scale hysteresis loss_scale_window min_loss_scale", "HD", "model.dtype "
                 "decides; bfloat16 needs no loss scaling"),
        key("pooling pooling_method sentence_pooling_method pooling_mode pooling_type pooler_type pool_type", "FTB",
            "embedding.pooling", "lasttoken, mean, cls or weightedmean; eos, last and last_token are lasttoken"),
        key("normalize normalize_embeddings l2_normalize normalized normlized", "FT", "embedding.normalize"),
        unneeded("append_eos_token add_eos_token append_eos", "T", "training with pooling lasttoken appends the "
                 "tokenizer's EOS, unless the tokenizer does"),
        key("matryoshka_dims mrl_dims matryoshka_dimensions", "B", "embedding.matryoshka_dims", "largest first"),
        key("truncate_dim", "B", "embedding.matryoshka_dims", "widths that the loss is also taken at; `evaluate "
            "--dims` and `search --dim` truncate vectors"),
        key("projection_out_dim embedding_size output_dim embedding.dim embedding.dimension embedding.dimensions", "T",
            "embedding.embedding_dim", "of a new linear layer over the pooled vector"),
        key("similarity_fct similarity similarity_fn_name similarity_function", "B", "embedding.normalize", "true "
            "compares by cosine, false by dot product"),
        key("bidirectional is_causal_false use_bidirectional_attention", "T", "model.bidirectional"),
        key("num_labels num_classes", "HSB", "reranker.head", "a reranker has one score; head: score or yes_no"),
        key("use_sigmoid activation_fn default_activation_function", "B", "reranker.activation", "sigmoid or identity"),
        key("generative_reranker_positive_token yes_token positive_token", "S", "reranker.true_token"),
        key("generative_reranker_negative_token no_token negative_token", "S", "reranker.false_token"),
        unsupported("rope_scaling max_model_len max_position_embeddings", "HS", "positions are those of config.json; "
                    "change them there before training"),
        unsupported("additional_special_tokens new_special_tokens resize_token_embeddings", "SF", "add tokens to the "
                    "tokenizer and rows to the embeddings first, save the model, and give that directory"),
        key("unified_finetuning", "F", "embedding.head", "true: joint, BGE-M3's three heads"),
        key("use_self_distill", "F", "objective.self_distillation", "of embedding.head: joint"),
        key("colbert_dim", "F", "embedding.embedding_dim", "of embedding.head: joint; -1: null"),
        unsupported("self_distill_start_step fix_encoder", "F", "all of a model is trained, and by self-distillation "
                    "from the first step"),
        unsupported("sparse_vector use_sparse splade_reg", "FT", "set embedding.head: sparse, and the regularizers of "
                    "objective"),
        unsupported("untie_encoder share_encoder add_pooler projection_in_dim", "T", "one encoder gives the vectors of "
                    "queries and documents; embedding.embedding_dim adds a linear layer over the pooled vector"),
        unsupported("start_layer head_multi head_type compress_ratio compress_layers cutoff_layers", "F", "rerankers "
                    "here score at the last layer"),
        unsupported("max_pixels freeze_vit freeze_aligner freeze_llm vit_lr aligner_lr image_folder encode_image", "ST",
                    "only texts can be trained on"),
    ),
    "Data": (
        key("dataset dataset.path dataset.file train_dataset.path data.file dataset.train data.train data.path "
            "train_dataset train_data train_file train_files data_path dataset_path train_path training_data "
            "data_files datasets train_data_path train_set data_dir train_datasets", "HSFTB", "data.train",
            "a list of files, folders or hub names; `data: {train: [FILE.jsonl]}`"),
        key("dataset_name dataset.name", "HT", "data.train", "org/name:config/split of the hub"),
        key("dataset_config dataset_config_name subset", "HT", "data.train", "write it into the path: org/name:config"),
        key("dataset_split split train_split", "HT", "data.train", "write it into the path: org/name:config/split"),
        key("corpus_name corpus_path corpus_config corpus_split corpus_file", "T", "data.train.corpus",
            "of the entry whose rows name their documents by id"),
        key("val_dataset data.val data.validation data.dev data.eval eval_dataset validation_file valid_data "
            "eval_data val_data val_file eval_file dev_data validation_data dev_file valid_file val_files dataset.val "
            "dataset.validation dev_datasets eval_set dev_set", "HSFB", "data.validation"),
        key("split_dataset_ratio validation_split val_split validation_ratio val_size test_size eval_ratio val_ratio "
            "validation_split_percentage train_test_split", "HS", "data.validation_fraction"),
        key("columns column_mapping column_map rename_columns", "S", "data.train.columns", "{column of the file: "
            "field}, as in {question: query, answer: positive}"),
        key("anchor_column sentence1_column query_column query_field", "B", "data.train.columns", "{that column: "
            "query}"),
        key("positive_column sentence2_column passage_column document_column positive_field", "B", "data.train.columns",
            "{that column: positive}"),
        key("negative_column negative_field", "B", "data.train.columns", "{that column: negatives}"),
        key("target_column label_column score_column", "B", "data.train.columns", "{that column: score}"),
        key("streaming", "HS", "data.train.streaming", "of one entry"),
        key("max_train_samples max_samples max_example_num_per_dataset num_samples max_train_rows", "HF",
            "data.train.rows", "of one entry that is streamed; of a file give one with fewer rows"),
        key("interleave_prob probabilities mixing_weights", "S", "data.train.weight", "of each entry"),
        key("shuffle dataset_shuffle train_dataloader_shuffle", "S", "data.shuffle"),
        unneeded("shuffle_buffer_size val_dataset_shuffle stopping_strategy", "S", "an epoch is one permutation of "
                 "all rows"),
        key("same_dataset_within_batch multi_dataset_batch_sampler", "FB", "data.mixed_batches", "the other way "
            "round: with shuffle a batch comes from one data set unless mixed_batches is true"),
        unneeded("batch_sampler", "B", "with shuffle no text occurs twice in a global batch, as with no_duplicates"),
        unneeded("small_threshold drop_threshold lazy_tokenize strict check_model custom_dataset_info preprocess "
                 "external_plugins custom_register_path", "SF", "every row is checked before the first step"),
        unneeded("dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers dataset_num_proc "
                 "dataloader_prefetch_factor preprocessing_num_workers num_proc num_workers tokenizers_parallelism "
                 "dataset_number_of_shards dataset_shard_index omp_num_threads", "HST",
                 "rows are tokenized while the step before is computed"),
        unneeded("dataloader_drop_last drop_last", "HS", "rows without a full batch at the end of an epoch open the "
                 "next one"),
        unneeded("remove_unused_columns label_names", "HS", "columns without a meaning are ignored and named in the "
                 "log"),
        key("max_length max_len max_seq_length cutoff_len model_max_length seq_length max_seq_len rerank_max_len "
            "max_input_length max_tokens", "HSFTB", "data.query_max_length data.document_max_length", "tokens with "
            "prompt and special tokens; for a reranker reranker.max_length, of the pair"),
        key("query_max_len query_max_length max_query_length q_max_len query_maxlen max_query_len max_len_query", "FT",
            "data.query_max_length"),
        key("passage_max_len passage_max_length p_max_len doc_max_len max_passage_length max_doc_length "
            "document_max_len doc_max_length max_document_length p_maxlen", "FT", "data.document_max_length"),
        unneeded("truncation_strategy truncation truncation_side", "S", "a longer text loses tokens from its end, "
                 "never from the prompt"),
        unneeded("padding padding_side pad_to_multiple_of padding_free packing pad_to_max_length group_by_length "
                 "length_column_name variable_seq_lengths", "HSFTM", "texts are packed one after the other, without "
                 "padding between them"),
        key("train_group_size train_n_passages n_passages group_size", "FT", "data.num_negatives", "the group's size - "
            "1, since a group also holds the positive"),
        key("num_negatives loss.hard_negatives num_hard_negatives infonce_hard_negatives max_negative_samples "
            "negative_number data.hard_negatives num_neg num_hard_neg negatives_per_query num_negs_per_system", "SB",
            "data.num_negatives"),
        unsupported("negs_to_use ce_score_margin", "B", "training takes the negatives that the rows have; `mine` "
                    "writes them, with --relative-margin and --reranker"),
        key("max_positive_samples", "S", "data.num_positives", "embedding models; a reranker takes all positives"),
        key("positive_passage_no_shuffle", "T", "data.document_sampling", "first"),
        key("negative_passage_no_shuffle", "T", "data.document_sampling", "first"),
        key("query_prefix query_instruction query_instruction_for_retrieval query_instruction_for_rerank query_prompt",
            "FTB", "data.query_prompt",
            "exactly as it shall stand before the query, with its space; {instruction} in it takes that of a row"),
        key("query_instruction_format query_instruction_format_for_retrieval", "F", "data.query_prompt",
            "{instruction} in place of its first {}; what follows is the query"),
        key("passage_prefix passage_instruction passage_instruction_for_retrieval passage_instruction_for_rerank "
            "doc_prefix document_prefix passage_prompt document_instruction", "FTB", "data.document_prompt"),
        key("passage_instruction_format", "F", "data.document_prompt"),
        key("prompts", "B", "data.query_prompt data.document_prompt", "by role instead of by column"),
        key("system system_prompt default_system", "S", "embedding.instruction", "with {instruction} in "
            "data.query_prompt; for a reranker reranker.instruction"),
        key("sep_token reranker_prompt prompt_template", "F", "reranker.template", "the whole text of a pair with "
            "{query} and {document}"),
        unsupported("shuffle_ratio example_query_max_len example_passage_max_len retrieval_use_examples "
                    "icl_suffix_str", "F", "texts are taken as they are; write augmented texts and examples into the "
                    "rows"),
    ),
    "Loss": (
        key("loss_type trainer loss loss.type loss.name objective.type objective.name loss_function loss_fn train_loss "
            "criterion", "SB", "objective.loss", "docs/objectives.md lists the losses"),
        key("temperature t infonce_temperature tau temp loss.temperature softmax_temperature", "SFT",
            "objective.temperature"),
        key("scale similarity_scale", "B", "objective.temperature", "1 / scale"),
        key("infonce_use_batch use_inbatch_neg use_in_batch_negatives in_batch_negatives use_batch", "SF",
            "data.train.in_batch_negatives", "of each entry"),
        key("infonce_mask_fake_negative mask_fake_negative", "S", "objective.mask_margin", "0.1 is ms-swift's margin; "
            "null is off"),
        key("infonce_fake_neg_margin fake_neg_margin", "S", "objective.mask_margin"),
        key("infonce_include_qq include_qq", "S", "objective.directions", "add query_to_query"),
        key("infonce_include_dd include_dd", "S", "objective.directions", "add document_to_document"),
        key("symmetric symmetric_loss", "B", "objective.directions", "query_to_document and document_to_query, with "
            "objective.partition: per_direction"),
        key("negatives_cross_device gather_across_devices cross_device_negatives cross_batch_negatives "
            "negatives_x_device", "FB", "objective.negatives", "negatives are always those of all data-parallel "
            "ranks; micro_batch leaves out accumulated micro-batches"),
        key("margin loss_margin triplet_margin", "B", "objective.margin", "reranker.margin for margin_ranking"),
        key("knowledge_distillation", "F", "objective.loss", "kl_distillation, with a teacher's scores in the rows, "
            "instead of the contrastive loss, not added to it"),
        key("kd_loss_type", "F", "objective.loss", "kl_distillation"),
        key("distil_temperature", "T", "objective.teacher_temperature"),
        unneeded("grad_cache", "T", "the gradient cache is always on; training.micro_batch_size is its chunk"),
        key("gc_q_chunk_size query_num_chunks", "T", "training.micro_batch_size", "queries whose texts are computed at "
            "once; the gradient cache is always on"),
        key("gc_p_chunk_size passage_num_chunks", "T", "training.micro_batch_size", "a query's documents are computed "
            "with it"),
        key("mini_batch_size", "B", "training.micro_batch_size", "the gradient cache is always on: this is its chunk"),
        unneeded("sub_batch_size", "F", "training.micro_batch_size queries are computed at once"),
        key("listwise_reranker_temperature", "S", "reranker.temperature"),
        unneeded("listwise_reranker_min_group_size", "S", "a list of one document adds nothing to listwise"),
        key("guide guide_model guide_model_name_or_path", "B", "objective.guide_model", "with objective.mask_margin, "
            "which is minus the margin there"),
        unsupported("label_smoothing_factor label_smoothing neftune_noise_alpha loss_scale_strategy enable_dft_loss "
                    "enable_channel_loss", "HS", "losses for text generation; remove it"),
        key("router_aux_loss_coef moe_aux_loss_coeff", "SM", "training.moe_aux_loss_coefficient"),
    ),
    "Steps": (
        key("per_device_train_batch_size per_gpu_train_batch_size batch_size train_micro_batch_size_per_gpu "
            "per_device_batch_size micro_batch_size bs train_bs", "HSFTBDM", "training.micro_batch_size "
            "training.global_batch_size", "global_batch_size is this x devices x accumulation steps"),
        key("gradient_accumulation_steps gradient_accumulation grad_accum accumulation_steps accumulate_grad_batches "
            "grad_accumulation_steps", "HSFTBD", "training.global_batch_size", "queries of one optimizer step over "
            "all devices: batch size per device x devices x accumulation steps"),
        key("train_batch_size global_batch_size", "DM", "training.global_batch_size", "queries of one optimizer step"),
        unneeded("auto_find_batch_size", "H", "`megatron-embed plan` computes what fits"),
        key("num_train_epochs epochs num_epochs max_epochs n_epochs epoch", "HSFTB", "training.epochs",
            "not together with train_steps"),
        key("max_steps train_iters max_train_steps total_steps num_train_steps num_steps training_steps "
            "total_num_steps train_steps iterations num_iterations", "HSM", "training.train_steps"),
        key("learning_rate lr peak_lr optimizer.params.lr", "HSFTBDM", "training.learning_rate"),
        key("min_lr lr_end min_learning_rate warmup_min_lr", "HM", "training.min_learning_rate"),
        unneeded("warmup_max_lr", "D", "training.learning_rate is the top of the warmup"),
        key("warmup_ratio lr_warmup_fraction warmup_proportion warmup_fraction", "HSFTM", "training.warmup_ratio"),
        key("warmup_steps num_warmup_steps lr_warmup_iters warmup_num_steps lr_warmup_steps warmup", "HBDM",
            "training.warmup_steps"),
        key("lr_scheduler_type lr_scheduler scheduler scheduler_type lr_decay_style scheduler.type lr_schedule", "HSM",
            "training.lr_decay_style", "constant, linear, cosine, inverse-square-root or wsd"),
        key("lr_scheduler_kwargs", "H", "training.min_learning_rate", "min_lr; wsd_decay_ratio for the share of the "
            "decay"),
        key("weight_decay wd optimizer.params.weight_decay", "HSFTBDM", "training.weight_decay"),
        key("max_grad_norm gradient_clipping grad_clip clip_grad clip_grad_norm gradient_clip_val", "HSBDM",
            "training.clip_grad"),
        key("adam_beta1", "HSM", "training.adam_beta1"),
        key("adam_beta2", "HSM", "training.adam_beta2"),
        key("adam_epsilon adam_eps optimizer.params.eps eps epsilon", "HDM", "training.adam_eps"),
        key("betas optimizer.params.betas", "D", "training.adam_beta1 training.adam_beta2"),
        key("optim optimizer optimizer.name optimizer_type optimizer.type optimizer_name optim_type", "HSD",
            "optimizer.name", "adamw, adamw_8bit (of bitsandbytes) or muon; settings: adam_beta1, adam_beta2, adam_eps "
            "and weight_decay of section training"),
        unsupported("optim_args learning_rate_mapping use_galore galore_rank galore_update_proj_gap "
                    "galore_quantization lisa_activated_layers use_muonclip lorap_lr_ratio loraplus_lr_ratio", "HSB",
                    "the optimizer is AdamW with one learning rate; LoRA needs less memory than GaLore"),
        key("gradient_checkpointing activation_checkpointing use_gradient_checkpointing recompute_granularity "
            "gradient_checkpointing_enable", "HSFTM", "training.recompute", "full is gradient checkpointing"),
        unneeded("gradient_checkpointing_kwargs activation_checkpointing_kwargs vit_gradient_checkpointing "
                 "recompute_method recompute_num_layers", "HSM", "training.recompute: full recomputes every layer"),
        key("hidden_dropout hidden_dropout_prob dropout resid_pdrop", "HM", "training.hidden_dropout", "0 unless it is "
            "set here, whatever config.json has"),
        key("attention_dropout attention_probs_dropout_prob attention_dropout_prob attn_pdrop", "HM",
            "training.attention_dropout", "0 unless it is set here, whatever config.json has"),
        unsupported("ema_decay use_ema ema", "H", "no moving average of the weights is kept; `merge --method linear` "
                    "averages exports"),
        key("seed random_seed", "HSFTB", "training.seed"),
        unneeded("data_seed dataset_seed", "HS", "training.seed is the seed of everything"),
        key("full_determinism deterministic", "HS", "training.deterministic"),
        unneeded("use_liger_kernel torch_compile torch_compile_backend torch_compile_mode apply_rope_fusion use_cache "
                 "torch_empty_cache_steps cross_entropy_loss_fusion low_cpu_mem_usage bias_swiglu_fusion "
                 "use_logits_to_keep", "HSM",
                 "the losses here never hold a vocabulary's logits; kernels are chosen by model.attention"),
        unneeded("do_train train "
                 "do_eval do_predict disable_tqdm log_level logging_first_step logging_strategy "
                 "ignore_args_error debug skip_memory_metrics logging_nan_inf_filter full_eval plot_loss past_index "
                 "wall_clock_breakdown", "HSD", "the command "
                 "says what is done, and every logging.every_steps is logged"),
    ),
    "LoRA": (
        key("train_type lora.enabled lora.enable lora.use_lora "
            "tuner_type finetuning_type use_lora lora use_peft sft_type peft", "SFT", "lora.rank", "0 "
            "trains every parameter, 1 or more trains adapters of that rank"),
        key("lora_rank peft.r peft.rank lora_config.r lora_config.rank "
            "lora_r lora.r lora.rank peft_lora_r", "HSFT", "lora.rank"),
        key("lora_alpha peft.alpha lora_config.alpha "
            "lora.lora_alpha lora.alpha peft_lora_alpha", "HSFT", "lora.alpha"),
        key("lora_dropout peft.dropout lora_config.dropout lora_dropout_p "
            "lora.lora_dropout lora.dropout", "HSFT", "lora.dropout"),
        key("target_modules lora_target_modules lora_target lora.target_modules lora_modules", "HSFT",
            "lora.target_modules"),
        key("use_rslora", "S", "lora.use_rslora"),
        key("lora_name_or_path adapters peft_model_path adapter_name_or_path from_peft raw_peft ref_adapters "
            "adapter_load", "SFT", "model.path", "the PEFT directory itself, which names its base model"),
        unneeded("save_merged_lora_model merge_lora lora_bias_none inference_mode save_safetensors safe_serialization",
                 "SFT", "checkpoint.export_at_end is the merged model; `convert --format peft` writes the adapter"),
        unsupported("use_dora lora_bias lora.bias init_weights init_lora_weights target_regex target_parameters "
                    "modules_to_save lora_ga_batch_size vera_rank boft_block_size reft_rank adalora_target_r "
                    "layers_to_transform lora_ga_iters", "HSF", "adapters are plain LoRA (or rsLoRA) without biases; "
                    "a reranker's score head is trained completely beside them"),
        key("load_in_4bit use_qlora", "HS", "model.quantization", "nf4, under adapters"),
        key("load_in_8bit", "HS", "model.quantization", "int8, under adapters"),
        key("quant_bits quantization_bit", "HS", "model.quantization", "4 is nf4, 8 is int8, under adapters"),
        key("bnb_4bit_quant_type", "HS", "model.quantization", "nf4; fp4 is not computed"),
        key("quant_method", "HS", "model.quantization", "bitsandbytes' nf4 and int8, no other method"),
        key("bnb_4bit_use_double_quant double_quant", "HS", "model.double_quantization"),
        unneeded("bnb_4bit_compute_dtype", "HS", "quantized weights are restored in model.dtype for their products"),
        unsupported("quantization quantization_config tuner_backend use_unsloth hqq_axis", "HS",
                    "base weights are quantized by model.quantization: nf4 or int8, no other method"),
        unsupported("freeze_parameters freeze_parameters_ratio freeze_parameters_regex trainable_parameters "
                    "fix_position_embedding freeze_layers freeze_trainable_layers freeze_non_embedding", "SF", "all "
                    "parameters are trained, or adapters alone; set lora.rank"),
    ),
    "Checkpoints, evaluation, logs": (
        key("output_dir project_name "
            "save output_path save_dir checkpoint_dir output out_dir output_model_dir model_save_path",
            "HSFTBM", "checkpoint.directory checkpoint.export_at_end", "training state in the first, the trained "
            "model in the second"),
        unneeded("overwrite_output_dir add_version overwrite", "HS", "a run resumes from checkpoint.directory; nothing "
                 "is overwritten"),
        unneeded("resume_from_checkpoint resume resume_only_model ignore_data_skip auto_resume load_args "
                 "load_checkpoint_path restore_callback_states_from_checkpoint", "HS", "the same command resumes if "
                 "checkpoint.directory holds a checkpoint"),
        key("save_steps save_interval checkpointing_steps checkpoint_save_steps checkpoint_interval save_freq", "HSFTM",
            "checkpoint.save_every_steps"),
        key("save_strategy", "HS", "checkpoint.save_every_steps checkpoint.save_every_epochs", "the last step is "
            "always saved"),
        key("save_total_limit checkpoint_save_total_limit max_checkpoints keep_last_n", "HSF", "checkpoint.keep"),
        unsupported("save_only_model no_save_optim no_save_rng save_on_each_node", "HSM", "a checkpoint always holds "
                    "the optimizer, so that a run can resume; lower checkpoint.keep to save space"),
        key("load_best_model_at_end save_best_model save_best", "HB", "checkpoint.export", "best, with "
            "checkpoint.export_at_end"),
        key("metric_for_best_model best_metric", "H", "evaluation.best_metric", "ndcg@10, spearman, loss, ..."),
        unneeded("greater_is_better", "H", "it follows from evaluation.best_metric"),
        key("early_stopping_patience early_stopping early_stop_interval patience early_stopping_steps", "H",
            "evaluation.patience", "evaluations without a better best_metric"),
        key("eval_steps evaluation_steps eval_interval eval_every evaluation_interval eval_freq", "HSBM",
            "evaluation.every_steps"),
        key("eval_strategy evaluation_strategy evaluation.strategy", "HS", "evaluation.every_steps", "data.validation "
            "or evaluation.retrieval say what is evaluated"),
        key("eval_on_start", "H", "evaluation.at_start"),
        unneeded("per_device_eval_batch_size eval_batch_size eval_accumulation_steps eval_iters eval_delay "
                 "prediction_loss_only predict_with_generate per_gpu_eval_batch_size batch_eval_metrics eval_limit",
                 "HSBM", "held-out rows are evaluated in batches of at most global_batch_size"),
        key("evaluator evaluators eval_dataset_name eval_benchmark beir_dataset", "B", "evaluation.retrieval", "BEIR "
            "folders; evaluation.sts and evaluation.reranking for files of pairs and of lists"),
        key("logging_steps log_interval logging_interval log_steps log_every logging_freq log_every_n_steps "
            "steps_per_print", "HSFTDM", "logging.every_steps"),
        key("logging_dir tensorboard_dir log_dir", "HS", "logging.directory", "TensorBoard's files are in its "
            "subfolder tensorboard"),
        key("report_to use_wandb logger log_with", "HS", "logging.wandb logging.tensorboard", "true or false each"),
        unneeded("run_name wandb_project wandb_name wandb_exp_name project experiment_name wandb_run_name wandb_mode "
                 "swanlab_project swanlab_token", "HSM", "WANDB_PROJECT, WANDB_NAME and WANDB_MODE say it"),
        unsupported("push_to_hub hub_model_id hub_strategy hub_private_repo hub_always_push hub_revision", "HS",
                    "upload the export: huggingface-cli upload ORG/NAME DIRECTORY"),
    ),
    "Devices": (
        key("deepspeed deepspeed_config_file deepspeed_config", "HSD", "optimizer.distributed", "ZeRO-1; what ZeRO-2 "
            "and ZeRO-3 share besides, tensor and pipeline parallelism divide: parallel.tensor_model_parallel_size"),
        key("zero_stage zero_optimization.stage", "D", "optimizer.distributed", "true is stage 1; for 3 divide the "
            "model with parallel.tensor_model_parallel_size"),
        unneeded("use_deepspeed", "D", "optimizer.distributed, on by default, is ZeRO-1"),
        key("offload_optimizer offload_optimizer.device zero_offload offload_param offload_param.device cpu_offload "
            "optimizer_cpu_offload deepspeed_offload offload_optimizer_device zero3_init_flag offload_param_device",
            "D", "optimizer.cpu_offload", "optimizer state in host memory; needs a GPU"),
        unneeded("overlap_comm contiguous_gradients reduce_bucket_size allgather_bucket_size reduce_scatter "
                 "stage3_prefetch_bucket_size stage3_param_persistence_threshold sub_group_size "
                 "stage3_gather_16bit_weights_on_model_save allgather_partitions round_robin_gradients pin_memory "
                 "zero_hpz_partition_size stage3_max_live_parameters stage3_max_reuse_distance", "D",
                 "Megatron-Core's buckets; optimizer.overlap_grad_reduce says whether they overlap"),
        key("fsdp fsdp_config fsdp_num use_fsdp fsdp_transformer_layer_cls_to_wrap", "H", "optimizer.distributed",
            "shards the optimizer; divide parameters with parallel.tensor_model_parallel_size"),
        unneeded("device_map max_memory device devices gpus num_gpus use_cpu no_cuda local_rank ddp_backend n_gpu "
                 "ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers average_tokens_across_devices "
                 "no_local_rank use_ray distributed_type accelerator_config ddp_static_graph cuda_visible_devices",
                 "HS", "the launcher says on which devices: torchrun --nproc-per-node 8 -m megatron_embed train"),
        unneeded("nproc_per_node nnodes num_processes num_machines node_rank master_addr master_port machine_rank "
                 "main_process_port main_process_ip world_size rdzv_endpoint rdzv_backend", "HSD", "options of the "
                 "launcher, not of a run"),
        key("tensor_parallel_size tp_size tensor_model_parallel_size deepspeed_autotp_size tp", "SM",
            "parallel.tensor_model_parallel_size"),
        key("pipeline_parallel_size pp_size pipeline_model_parallel_size pp", "M",
            "parallel.pipeline_model_parallel_size"),
        key("sequence_parallel_size context_parallel_size cp_size ulysses_sequence_parallel_size cp", "SM",
            "parallel.context_parallel_size", "ranks that share the tokens of a text"),
        key("expert_parallel_size ep_size expert_model_parallel_size ep", "M", "parallel.expert_model_parallel_size"),
        key("sequence_parallel", "M", "parallel.sequence_parallel"),
        key("ddp_timeout distributed_timeout_minutes timeout", "HM", "parallel.timeout_seconds", "in seconds"),
        key("use_distributed_optimizer", "M", "optimizer.distributed"),
        key("virtual_pipeline_model_parallel_size", "M", "parallel.virtual_pipeline_model_parallel_size"),
        key("overlap_grad_reduce", "M", "optimizer.overlap_grad_reduce"),
        key("overlap_param_gather", "M", "optimizer.overlap_param_gather"),
        key("fp8 fp8_format", "M", "model.fp8", "none, first_pass or both, of linear layers, with Transformer Engine; "
            "model.dtype is bfloat16 beside it"),
        key("fp8_recipe", "M", "model.fp8_recipe", "tensorwise or blockwise, with the scaling of current values"),
        key("tp_comm_overlap", "M", "parallel.tp_comm_overlap", "with training.micro_batch_tokens"),
        key("transformer_impl", "M", "model.backend", "te, torch, or auto, the default: te where it can run"),
        unsupported("fp8_param_gather decoder_first_pipeline_num_layers decoder_last_pipeline_num_layers", "M", "leave "
                    "it out; weights are float32 or bfloat16, and layers are divided evenly over the stages"),
        unneeded("manual_gc manual_gc_interval ckpt_format load_safetensors finetune no_load_optim no_load_rng "
                 "calculate_per_token_loss dataloader_type log_throughput use_cpu_initialization no_initialization "
                 "attention_softmax_in_fp32", "M", "set by the layout and the model here"),
        key("use_precision_aware_optimizer", "M", "optimizer.precision_aware"),
        key("async_save", "M", "checkpoint.async_save"),
        key("exit_duration_in_mins max_time", "M", "training.exit_duration_minutes"),
    ),
}
"""By subject."""

_BY_NAME = {name: word for words in FOREIGN_WORDS.values() for word in words for name in word.names}


def normalized(name: str) -> str:
    """An option or key as the table spells it: `--Learning-Rate` is learning_rate."""
    return name.strip().lstrip("-").lower().replace("-", "_")


def near_foreign_name(key: str, cutoff: float) -> str | None:
    """The name in the table that is most like a key, from this similarity on."""
    names = [name for name in _BY_NAME if "." not in name]
    return next(iter(difflib.get_close_matches(normalized(key), names, n=1, cutoff=cutoff)), None)


def foreign_word(dotted: str) -> ForeignWord | None:
    """The entry of a key or option, by its last two parts, then by its last one; None if the table has none."""
    parts = [normalized(part) for part in dotted.split(".")]
    return _BY_NAME.get(".".join(parts[-2:])) or _BY_NAME.get(parts[-1])
