CUDA_VISIBLE_DEVICES=0 python -m tevatron.retriever.driver.train --model_name_or_path bert-base-uncased \
  --dataset_name json --dataset_path train.jsonl --corpus_path corpus.jsonl \
  --grad_cache --gc_q_chunk_size 8 --gc_p_chunk_size 32 --train_group_size 4 --fp16 \
  --per_device_train_batch_size 128 --learning_rate 5e-6 --max_steps 4000 --positive_passage_no_shuffle \
  --negative_passage_no_shuffle --output_dir out --seed 13
