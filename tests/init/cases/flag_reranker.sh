torchrun --nproc_per_node 2 \
	-m FlagEmbedding.finetune.reranker.encoder_only.base \
	--model_name_or_path BAAI/bge-reranker-v2-m3 --train_data examples.jsonl \
    --train_group_size 8 --query_max_len 256 --passage_max_len 256 --max_len 384 \
    --knowledge_distillation False --output_dir ./out --overwrite_output_dir \
    --learning_rate 6e-5 --fp16 --num_train_epochs 2 --per_device_train_batch_size 2 \
    --gradient_accumulation_steps 1 --dataloader_drop_last True --warmup_ratio 0.1 \
    --weight_decay 0.01 --deepspeed ../ds_stage0.json --logging_steps 1 --save_steps 1000
