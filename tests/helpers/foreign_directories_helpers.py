"""Embedding models in the directories that Sentence Transformers 2 to 5 wrote."""

import atexit
import functools
import json
import shutil
import tempfile
from pathlib import Path

from tests.helpers.toys import save_model

FLAT = ("{% for m in messages %}{{ m.role }}: {{ m.content }} end\n{% endfor %}"
        "{% if add_generation_prompt %}answer:{% endif %}")
KIND = {"method": "forward", "method_output_name": "last_hidden_state"}

def write(path, values):
    path.parent.mkdir(exist_ok=True)
    path.write_text(values if isinstance(values, str) else json.dumps(values), encoding="utf-8")


def change(path, **values):
    write(path, {**json.loads(path.read_text(encoding="utf-8")), **values})


def chat(content, **more):
    """sentence_bert_config.json of a model of chats."""
    return {"transformer_task": "feature-extraction", "module_output_name": "token_embeddings", "max_seq_length": 24,
            "modality_config": {"text": KIND, "message": {**KIND, "format": content}}, **more}


@functools.cache
def model_of(kind):
    """A plain Hugging Face directory, made once."""
    path = Path(tempfile.mkdtemp()) / kind
    atexit.register(shutil.rmtree, path.parent, ignore_errors=True)
    return Path(save_model(path, kind, tokenizer=True, num_hidden_layers=2))


def save_directory(path, *, kind="bert", pooling="mean", normalize=True, sbert=None, settings=None):
    """A Sentence Transformers directory as versions 2 to 5 wrote it."""
    shutil.copytree(model_of(kind), path)
    modules = [("", "Transformer"), ("1_Pooling", "Pooling"), *([("2_Normalize", "Normalize")] if normalize else [])]
    write(path / "modules.json", [{"idx": index, "name": str(index), "path": folder,
                                   "type": f"sentence_transformers.models.{kind}"}
                                  for index, (folder, kind) in enumerate(modules)])
    write(path / "1_Pooling" / "config.json", pooling if isinstance(pooling, dict) else {
        "word_embedding_dimension": 32, **{f"pooling_mode_{name}": name == pooling + "_token" * (pooling == "cls")
                                           + "_tokens" * (pooling in ("mean", "weightedmean"))
                                           for name in ("cls_token", "mean_tokens", "max_tokens", "weightedmean_tokens",
                                                        "mean_sqrt_len_tokens", "lasttoken")}})
    write(path / "sentence_bert_config.json", sbert or {"max_seq_length": 16, "do_lower_case": False})
    write(path / "config_sentence_transformers.json", {"prompts": {}, "default_prompt_name": None, **(settings or {})})
    return path


def without_sep(path):
    """The tokenizer puts nothing around a text, as those of decoders."""
    values = json.loads((path / "tokenizer.json").read_text(encoding="utf-8"))
    values["post_processor"] = None
    write(path / "tokenizer.json", values)
    write(path / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "[PAD]",
                                           "eos_token": "[SEP]", "unk_token": "[UNK]"})
    (path / "special_tokens_map.json").unlink()
    return path


def left(path):
    change(path / "tokenizer_config.json", truncation_side="left")
    return path


def with_template(path, template, in_config=False):
    if in_config:
        change(path / "tokenizer_config.json", chat_template=template)
    else:
        write(path / "chat_template.jinja", template)
    return path
