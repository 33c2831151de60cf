nproc_per_node=4
export LISTWISE_RERANKER_TEMPERATURE=0.5 MAX_NEGATIVE_SAMPLES=15
NPROC_PER_NODE=$nproc_per_node NNODES=2 NODE_RANK=0 \
swift sft --model Qwen/Qwen3-Reranker-4B --task_type generative_reranker \
    --loss_type listwise_generative_reranker --train_type full \
    --dataset lists.jsonl --val_dataset held_out.jsonl \
    --eval_strategy steps --eval_steps 100 --save_steps 200 \
    --per_device_train_batch_size 2 --per_device_eval_batch_size 2 --gradient_accumulation_steps 8 \
    --learning_rate 6e-6 --label_names labels --dataloader_drop_last true --max_length 1024 \
    --deepspeed zero3_offload --output_dir output
swift export --model output --push_to_hub true
