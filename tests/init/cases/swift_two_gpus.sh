# 2 x 10 GiB
CUDA_VISIBLE_DEVICES=0,1 \
INFONCE_TEMPERATURE=0.1 \
INFONCE_INCLUDE_QQ=True INFONCE_INCLUDE_DD=True INFONCE_HARD_NEGATIVES=5 \
NPROC_PER_NODE=2 \
swift sft \
    --model Qwen/Qwen3-Embedding-4B \
    --task_type embedding \
    --tuner_type lora --lora_rank 8 --lora_alpha 32 --target_modules all-linear \
    --learning_rate=5e-6 \
    --dataset a.jsonl 'org/pairs:one/two#2000' \
    --attn_impl flash_attn \
    --padding_free true --torch_dtype bfloat16 \
    --split_dataset_ratio 0.02 \
    --eval_strategy epoch \
    --output_dir output \
    --save_steps 50 --save_total_limit 2 --logging_steps 5 \
    --num_train_epochs 0.5 \
    --max_length 8192 \
    --per_device_train_batch_size 8 \
    --gradient_accumulation_steps 1 \
    --warmup_ratio 0.05 \
    --lr_scheduler_type cosine_with_min_lr --lr_scheduler_kwargs '{"min_lr": 1e-6}' \
    --loss_type infonce \
    --use_liger_kernel false \
    --deepspeed zero2
