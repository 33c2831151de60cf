ARGS=(
  --model_name_or_path intfloat/e5-small-v2
  --train_file qa.csv                # question,answer
  --column_mapping '{"question": "query", "answer": "positive"}'
  --max_seq_length 256
  --no-shuffle
)
LR=${LR:-3e-5}
accelerate launch --multi_gpu --num_processes 4 --mixed_precision fp16 --gradient_accumulation_steps 2 \
    scripts/train_bi_encoder.py "${ARGS[@]}" --learning_rate $LR --num_train_epochs 3.0 \
    --per_device_train_batch_size 32 --loss cosent --scale 20 --weight_decay 0 --optim adafactor
