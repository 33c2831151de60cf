PYTORCH_CUDA_ALLOC_CONF='expandable_segments:True' NPROC_PER_NODE=8 \
megatron sft --model Qwen/Qwen3-Embedding-8B --task_type embedding --train_type full --dataset train.jsonl \
    --tensor_model_parallel_size 2 --sequence_parallel true --micro_batch_size 2 --global_batch_size 64 \
    --recompute_granularity full --recompute_method uniform --recompute_num_layers 1 \
    --max_epochs 1 --lr 1e-5 --min_lr 1e-6 --lr_warmup_fraction 0.05 --save out --save_interval 200 \
    --max_length 2048 --num_workers 8 --no_save_optim true --no_save_rng true --loss_type infonce \
    --use_precision_aware_optimizer false --attention_backend flash --cross_entropy_loss_fusion true
