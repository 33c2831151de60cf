"""Weights of RoBERTa and XLM-RoBERTa encoders, BAAI/bge-m3 and multilingual-e5 among them: BERT's names."""

from dataclasses import replace

from megatron_embed.convert.tables.bert import BERT

ROBERTA = replace(
    BERT,
    name="roberta",
    prefix="roberta.",
    rules=tuple(replace(rule, hf=rule.hf.replace("bert.", "roberta.", 1)) for rule in BERT.rules),
    passthrough=("roberta.pooler.*", "roberta.embeddings.position_ids", "lm_head.*", "classifier.*", "qa_outputs.*"),
    tied=(("lm_head.decoder.weight", "roberta.embeddings.word_embeddings.weight"),),
)
XLM_ROBERTA = replace(ROBERTA, name="xlm-roberta")
