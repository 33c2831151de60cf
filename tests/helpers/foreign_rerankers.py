"""Tiny cross-encoders as other programs write them, and their scores by the stock library and by ours."""

import json
from pathlib import Path

import torch
import transformers

from megatron_embed.errors import UserError
from tests.helpers.toys import copy_tokenizer, save_reranker

QUERY = "what is a quick fox"
DOCUMENTS = ("The quick brown fox", "HELLO World of things", "a fox " * 60 + " end of document")
ACTIVATION = {"sigmoid": "torch.nn.modules.activation.Sigmoid", "identity": "torch.nn.modules.linear.Identity"}
PLAIN_JINJA = ("{{ 'Task: judge. Q=' ~ (messages|selectattr('role','equalto','query')|list|first).content ~ ' D=' ~ "
               "(messages|selectattr('role','equalto','document')|list|first).content ~ ' Answer:' }}")
PROMPTED_JINJA = """{%- set given = messages | selectattr("role", "eq", "system") | map(attribute="content") | first -%}
{%- set instruction = given | default("Given a query, retrieve", true) -%}
<|im_start|>system
Judge "yes" or "no".<|im_end|>
<Instruct>: {{ instruction }}
<Query>: {{ messages | selectattr("role", "eq", "query") | map(attribute="content") | first }}
<Document>: {{ messages | selectattr("role", "eq", "document") | map(attribute="content") | first }}<|im_end|>
{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
STRUCTURED_JINJA = ("Q: {{ (messages | selectattr('role', 'eq', 'query') | first).content[0].text }} "
                    "D: {{ (messages | selectattr('role', 'eq', 'document') | first).content[0].text }} =")


def read(path):
    return json.loads(Path(path).read_text(encoding="utf-8"))


def edit(path, **values):
    """Keys of a JSON file set; None removes one."""
    path = Path(path)
    edited = (read(path) if path.is_file() else {}) | values
    path.write_text(json.dumps({key: value for key, value in edited.items() if value is not None}), encoding="utf-8")


def encoder(path, **config):
    """BertForSequenceClassification with one output."""
    torch.manual_seed(0)
    shape = transformers.BertConfig(
        vocab_size=30522, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=128, initializer_range=0.3, num_labels=1)
    transformers.BertForSequenceClassification(shape).save_pretrained(path)
    copy_tokenizer(path)
    edit(path / "config.json", **config)
    return path


def decoder(path, kind="Qwen3ForSequenceClassification", *, jinja=None):
    """A decoder of the class, with this chat template or none."""
    save_reranker(path, kind, tied=False)
    (path / "chat_template.jinja").unlink(missing_ok=True)
    edit(path / "tokenizer_config.json", chat_template=None)
    if jinja is not None:
        (path / "chat_template.jinja").write_text(jinja, encoding="utf-8")
    return path


def named_templates(path, templates, *, in_config=False):
    """Give the tokenizer chat templates with names, in files or in tokenizer_config.json."""
    if in_config:
        edit(path / "tokenizer_config.json", chat_template=[
            {"name": name, "template": text} for name, text in templates.items()])
        return path
    (path / "additional_chat_templates").mkdir()
    for name, text in templates.items():
        file = "chat_template.jinja" if name == "default" else f"additional_chat_templates/{name}.jinja"
        (path / file).write_text(text, encoding="utf-8")
    return path


def saved(path, *, message=None, answers=None, settings=None, **values):
    """Add Sentence Transformers' files. `answers`: token ids of a LogitScore; `values`: the model's own settings."""
    how = {"method": "forward", "method_output_name": "logits"}
    modules = [("", "base.modules.transformer.Transformer")]
    if answers is not None:
        modules.append(("1_LogitScore", "cross_encoder.modules.logit_score.LogitScore"))
        (path / "1_LogitScore").mkdir(exist_ok=True)
        edit(path / "1_LogitScore" / "config.json", true_token_id=answers[0], false_token_id=answers[1],
             module_input_name="causal_logits")
    (path / "modules.json").write_text(json.dumps(
        [{"idx": index, "name": str(index), "path": folder, "type": f"sentence_transformers.{kind}"}
         for index, (folder, kind) in enumerate(modules)]))
    edit(path / "config_sentence_transformers.json", **{"model_type": "CrossEncoder", "prompts": {}, **values})
    edit(path / "sentence_bert_config.json", **{
        "transformer_task": "sequence-classification" if answers is None else "text-generation",
        "modality_config": {"text": how, **({} if message is None else {"message": {**how, "format": message}})},
        "module_output_name": "scores" if answers is None else "causal_logits", **(settings or {})})
    return path


def own_scores(cases):
    """Our scores of DOCUMENTS for every (directory, query), or the message of the error. Called by all ranks."""
    from megatron_embed.api import open_any

    results = []
    for directory, query in cases:
        try:
            model = open_any(directory, pooling=None, max_length=None, dtype=None, normalize=True)
            results.append(model.rerank(query, DOCUMENTS).tolist())
        except UserError as error:
            results.append(str(error))
    return results


def stock_scores(path, query=QUERY, documents=DOCUMENTS):
    from sentence_transformers import CrossEncoder

    model = CrossEncoder(str(path), device="cpu", local_files_only=True)
    return model.predict([(query, document) for document in documents], batch_size=1)
