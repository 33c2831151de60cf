"""Somebody else's model directories: the vectors of the stock library, or a refusal that names file, key and value."""

import contextlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer

from megatron_embed.models.saved_settings import read_saved_settings
from tests.helpers.foreign_directories_helpers import (
    FLAT,
    KIND,
    change,
    chat,
    left,
    model_of,
    save_directory,
    with_template,
    without_sep,
    write,
)
from tests.helpers.ranks import run_on_ranks
from tests.helpers.tensor_files import assert_bit_equal, tensors_of
from tests.helpers.toys import MINILM

LONG = "a " * 40 + "long tail of words that is cut somewhere because it goes on and on until the end"
TEXTS = ["The quick brown fox", "HELLO World, Ünïcode", "量子计算的历史", LONG]
PARTS = ("{% for m in messages %}[{{ m.role }}] {{ m.content[0].text | trim }} .{% endfor %}"
         "{% if task %}{{ task }}{% endif %}")


def cased(path):
    """The tokenizer no longer lowercases, and its vocabulary knows letters of both cases."""
    values = json.loads((path / "tokenizer.json").read_text(encoding="utf-8"))
    values["normalizer"]["lowercase"] = False
    write(path / "tokenizer.json", values)
    change(path / "tokenizer_config.json", do_lower_case=False)
    return path


def in_own_folder(path):
    """The layout of Sentence Transformers before 2."""
    values = json.loads((path / "modules.json").read_text(encoding="utf-8"))
    values[0]["path"] = "0_Transformer"
    write(path / "modules.json", values)
    (path / "0_Transformer").mkdir()
    for file in [file for file in path.iterdir() if file.is_file()]:
        if file.name not in ("modules.json", "config_sentence_transformers.json"):
            shutil.move(file, path / "0_Transformer")
    return path


def left_by_truncation(path):
    """tokenizer.json alone says where a text is cut."""
    values = json.loads((path / "tokenizer.json").read_text(encoding="utf-8"))
    values["truncation"] = {"direction": "Left", "max_length": 8, "strategy": "LongestFirst", "stride": 0}
    write(path / "tokenizer.json", values)
    return path


PROMPTS = {"prompts": {"query": "query: ", "document": "text: ", "task": "Task: "}}
PASSAGE_PROMPT = {"prompts": {"query": "query: ", "passage": "text: "}}
HONOURED = {
    "plain": save_directory,
    "own-folder": lambda path: in_own_folder(save_directory(path)),
    "lower-case": lambda path: cased(save_directory(path, sbert={"max_seq_length": 16, "do_lower_case": True})),
    "lower-case-twice": lambda path: save_directory(path, sbert={"max_seq_length": 16, "do_lower_case": True}),
    "cased": lambda path: cased(save_directory(path)),
    "left": lambda path: left(save_directory(path)),
    "left-prompts": lambda path: left(save_directory(path, settings=PROMPTS)),
    "left-by-tokenizer-json": lambda path: left_by_truncation(save_directory(path)),
    "passage-prompt": lambda path: save_directory(path, settings=PASSAGE_PROMPT),
    "left-by-argument": lambda path: save_directory(path, sbert={
        "max_seq_length": 16, "tokenizer_args": {"truncation_side": "left"}}),
    "left-last-token": lambda path: left(without_sep(save_directory(path, kind="qwen3", pooling="lasttoken"))),
    "no-eos": lambda path: without_sep(save_directory(path, kind="qwen3", pooling="lasttoken")),
    "no-eos-mean": lambda path: without_sep(save_directory(path, kind="qwen3")),
    "chat": lambda path: with_template(save_directory(path, sbert=chat("flat"), settings=PROMPTS), FLAT),
    "chat-parts": lambda path: with_template(save_directory(path, sbert=chat("structured"), settings=PROMPTS), PARTS),
    "chat-auto": lambda path: with_template(save_directory(path, sbert=chat("auto")), PARTS, in_config=True),
    "chat-last-token": lambda path: with_template(without_sep(save_directory(
        path, kind="qwen3", pooling="lasttoken", settings=PROMPTS, sbert=chat(
            "flat", processing_kwargs={"chat_template": {"add_generation_prompt": True}}))), FLAT),
    "template-without-message": lambda path: with_template(save_directory(path), FLAT),
    "default-prompt": lambda path: save_directory(path, settings={**PROMPTS, "default_prompt_name": "task"}),
    "lengths-by-role": lambda path: save_directory(path, sbert={"max_seq_length": 30, "query_length": 8,
                                                                "document_length": 20}),
    "length-of-arguments": lambda path: save_directory(path, sbert={
        "max_seq_length": 30, "processor_kwargs": {"model_max_length": 12}, "model_args": {"torch_dtype": "float32"}}),
    "older-name-of-arguments": lambda path: save_directory(path, sbert={
        "max_seq_length": 30, "processor_kwargs": {"model_max_length": 20}, "tokenizer_args": {"model_max_length": 7}}),
    "no-limit": lambda path: save_directory(path, sbert={
        "max_seq_length": 10, "processor_kwargs": {"model_max_length": 10**30}}),
    "empty-file": lambda path: write(save_directory(path) / "sentence_bert_config.json", {}) or write(
        path / "sentence_roberta_config.json", {"max_seq_length": 9}),
    "length-of-the-call": lambda path: save_directory(path, sbert={
        "max_seq_length": 30, "query_length": 9, "processing_kwargs": {"text": {"max_length": 11}}}),
    "older-name": lambda path: (save_directory(path) / "sentence_bert_config.json").rename(
        path / "sentence_roberta_config.json"),
    "no-pooling-named": lambda path: save_directory(path, pooling={"word_embedding_dimension": 32}),
    "new-spelling": lambda path: save_directory(path, pooling={
        "embedding_dimension": 32, "pooling_mode": ["cls"], "include_prompt": True}),
    "both-spellings": lambda path: save_directory(path, pooling={
        "embedding_dimension": 32, "pooling_mode": "cls", "pooling_mode_mean_tokens": True}),
    "dropout": lambda path: write(save_directory(path, normalize=False) / "modules.json", [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.base.modules.transformer.Transformer"},
        {"idx": 1, "name": "1", "path": "1_Pooling",
         "type": "sentence_transformers.sentence_transformer.modules.pooling.Pooling", "kwargs": []},
        {"idx": 2, "name": "2", "path": "2_Dropout", "type": "sentence_transformers.models.Dropout"}]) or write(
            path / "2_Dropout" / "config.json", {"dropout": 0.1}),
}
RAW = ("raw-encoder",)


def vectors_of(directories):
    """Both roles' vectors of each directory, in a worker."""
    import megatron_embed

    vectors = {}
    for name, directory in directories.items():
        model = megatron_embed.load(directory)
        vectors[name] = {role: model.encode(TEXTS, role) for role in ("query", "document")}
    return vectors


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    folder = tmp_path_factory.mktemp("foreign")
    for name, save in HONOURED.items():
        save(folder / name)
    shutil.copytree(model_of("bert"), folder / "raw-encoder")
    return {name: str(folder / name) for name in (*HONOURED, *RAW)}


@pytest.fixture(scope="module")
def ours(directories):
    (vectors,) = run_on_ranks(vectors_of, 1, directories)
    return vectors


@pytest.mark.parametrize("name", [*HONOURED, *RAW])
def test_vectors_are_the_stock_library_s(directories, ours, name):
    stock = SentenceTransformer(directories[name], device="cpu")
    for role, encode in (("query", stock.encode_query), ("document", stock.encode_document)):
        expected = encode(TEXTS, batch_size=1, normalize_embeddings=name in RAW)
        np.testing.assert_allclose(ours[name][role], expected, atol=2e-6)


def test_the_cases_differ_from_the_plain_directory(ours):
    for name in ("cased", "left", "chat", "lengths-by-role", "length-of-arguments", "new-spelling",
                 "older-name-of-arguments", "no-limit", "empty-file"):
        assert abs(ours[name]["query"] - ours["plain"]["query"]).max() > 1e-3, name
    assert abs(ours["cased"]["query"] - ours["lower-case"]["query"]).max() > 1e-3


def test_a_prompt_that_the_stock_library_does_not_reach_is_named_once(tmp_path, caplog):
    path = save_directory(tmp_path / "model", settings=PASSAGE_PROMPT)
    for _ in range(2):
        assert read_saved_settings(path).prompts == {"query": "query: "}
    assert caplog.text.count("prompts has 'passage' but no 'document'") == 1


def encode_command(arguments):
    from tests.helpers.refusals import command

    return command(arguments)


def test_token_types_of_a_text_are_zero_or_refused(tmp_path):
    """The stock library gives the model the types of the tokenizer, if model_input_names has them."""
    path = save_directory(tmp_path / "model")
    tokenizer = json.loads((path / "tokenizer.json").read_text(encoding="utf-8"))
    ids = {name: next(token["id"] for token in tokenizer["added_tokens"] if token["content"] == name)
           for name in ("[CLS]", "[SEP]")}
    tokenizer["post_processor"] = {
        "type": "TemplateProcessing", "pair": [{"Sequence": {"id": name, "type_id": 0}} for name in "AB"],
        "single": [{"SpecialToken": {"id": "[CLS]", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 1}},
                   {"SpecialToken": {"id": "[SEP]", "type_id": 1}}],
        "special_tokens": {name: {"id": name, "ids": [token], "tokens": [name]} for name, token in ids.items()}}
    write(path / "tokenizer.json", tokenizer)
    change(path / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast",
           model_input_names=["input_ids", "attention_mask"])
    plain = SentenceTransformer(str(path), device="cpu").encode(TEXTS[:1])
    (vectors,) = run_on_ranks(vectors_of, 1, {"plain": str(path)})
    np.testing.assert_allclose(vectors["plain"]["document"][:1], plain, atol=2e-6)
    change(path / "tokenizer_config.json", model_input_names=["input_ids", "token_type_ids", "attention_mask"])
    assert abs(SentenceTransformer(str(path), device="cpu").encode(TEXTS[:1]) - plain).max() > 1e-2
    (refused,) = run_on_ranks(refusal_of, 1, str(path))
    assert "tokenizer.json: post_processor gives a text the token type 1, and only 0 is supported; write 0" in refused


def refusal_of(directory):
    """The error with which a directory is refused, in a worker."""
    import megatron_embed
    from megatron_embed.errors import UserError

    try:
        megatron_embed.load(directory)
    except UserError as error:
        return str(error)
    return ""


def test_texts_without_a_role_have_the_default_prompt(directories, tmp_path):
    write(tmp_path / "texts.jsonl", "".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    for name in ("default-prompt", "chat-parts"):
        output = tmp_path / f"{name}.npy"
        ((code, _, err, _),) = run_on_ranks(encode_command, 1, [
            "encode", "--model", directories[name], "--input", str(tmp_path / "texts.jsonl"), "--output", str(output)])
        assert code == 0, err
        expected = SentenceTransformer(directories[name], device="cpu").encode(TEXTS, batch_size=1)
        np.testing.assert_allclose(np.load(output), expected, atol=2e-6)


@pytest.mark.parametrize("added", [True, False])
def test_add_eos_token_is_honoured(tmp_path, added):
    """Transformers 4 appended it, and so was the model trained; 5 no longer does, nor Sentence Transformers on it."""
    path = without_sep(save_directory(tmp_path / "model", kind="qwen3", pooling="lasttoken"))
    change(path / "tokenizer_config.json", add_eos_token=added)
    ids = token_ids(path, ["a b"])
    assert (ids[0][-1] == 102) == added  # [SEP]


def token_ids(path, texts):
    from megatron_embed.data.tokenizer import RoleTokenizer
    from megatron_embed.loading.model_directory import find_model

    model = find_model(str(path))
    tokenizer = RoleTokenizer(str(model.tokenizer_directory), text_format=model.text_format, query_max_length=24,
                              add_eos=model.saved.pooling == "lasttoken" and model.saved.adds_eos,
                              document_max_length=24, query_prompt=model.saved.prompts.get("query", ""))
    return tokenizer.tokenize(texts, "query").token_ids


@pytest.mark.parametrize("name", ["chat", "chat-parts", "chat-last-token"])
def test_ids_in_a_chat_template_are_the_stock_library_s(directories, name):
    stock = SentenceTransformer(directories[name], device="cpu")
    texts = [*TEXTS, " spaces ", "{{ messages }}", *(("a " * count).strip() for count in range(1, 24))]
    expected = [stock.preprocess([text], prompt=stock.prompts["query"], task="query")["input_ids"][0].tolist()
                for text in texts]
    assert token_ids(directories[name], texts) == expected


REFUSED = {
    "euclidean": (dict(settings={"similarity_fn_name": "euclidean"}),
                  ["config_sentence_transformers.json", "similarity_fn_name = 'euclidean'", "cosine or dot"]),
    "manhattan": (dict(settings={"similarity_fn_name": "manhattan"}), ["similarity_fn_name = 'manhattan'"]),
    "maxsim": (dict(settings={"similarity_fn_name": "maxsim"}), ["similarity_fn_name = 'maxsim'"]),
    "truncate-dim": (dict(settings={"truncate_dim": 16}), ["truncate_dim = 16", "--dims"]),
    "sparse": (dict(settings={"model_type": "SparseEncoder"}), ["model_type = 'SparseEncoder'"]),
    "colbert": (dict(settings={"query_prefix": "[Q] "}), ["query_prefix = '[Q] '", "does not know"]),
    "default-prompt": (dict(settings={"default_prompt_name": "none"}), ["default_prompt_name = 'none'"]),
    "prompts": (dict(settings={"prompts": {"query": 1}}), ["prompts = {'query': 1}", "must map names to texts"]),
    "unknown": (dict(sbert={"max_seq_length": 16, "pool_twice": True}),
                ["sentence_bert_config.json: pool_twice = True", "does not know", "remove the key"]),
    "expansion": (dict(sbert={"query_expansion": {"strategy": "fixed", "length": 32}}),
                  ["query_expansion in sentence_bert", "remove the key"]),
    "task": (dict(sbert={"transformer_task": "fill-mask"}), ["transformer_task = 'fill-mask'"]),
    "logits": (dict(sbert={"module_output_name": "scores"}), ["module_output_name = 'scores'", "token_embeddings"]),
    "method": (dict(sbert={"modality_config": {"text": {"method": "get_text_features"}}}),
               ["modality_config.text.method = 'get_text_features'"]),
    "pictures": (dict(sbert={"modality_config": {"image": KIND}}), ["takes no texts"]),
    "no-template": (dict(sbert=chat("flat")), ["modality message", "no chat template"]),
    "arguments": (dict(sbert={"model_args": {"num_hidden_layers": 1}}), ["model_args.num_hidden_layers = 1"]),
    "no-special-tokens": (dict(sbert={"processing_kwargs": {"text": {"add_special_tokens": False}}}),
                          ["processing_kwargs.text.add_special_tokens = False"]),
    "length": (dict(sbert={"max_seq_length": -1}), ["max_seq_length = -1", "above 0"]),
    "no-length-of-arguments": (dict(sbert={"max_seq_length": 9, "processor_kwargs": {"model_max_length": None}}),
                               ["processor_kwargs.model_max_length = None", "remove the key"]),
    "no-length-of-the-call": (dict(sbert={"query_length": 9, "processing_kwargs": {"text": {"max_length": None}}}),
                              ["processing_kwargs.text.max_length = None", "remove the key"]),
    "length-of-text": (dict(sbert={"max_seq_length": "16"}), ["max_seq_length = '16'"]),
    "max": (dict(pooling={"word_embedding_dimension": 32, "pooling_mode_max_tokens": True}),
            ["1_Pooling/config.json", "pooling_mode_max_tokens = True"]),
    "two-poolings": (dict(pooling={"pooling_mode": ["mean", "cls"]}), ["pooling ['mean', 'cls'] is not supported"]),
    "new-pooling": (dict(pooling={"pooling_mode": "mean", "temperature": 2}), ["temperature = 2"]),
    "prompt-left-out": (dict(pooling={"pooling_mode": "mean", "include_prompt": False}, settings=PROMPTS),
                        ["include_prompt = false"]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_file_key_and_value(tmp_path, name):
    from megatron_embed.data.tokenizer import RoleTokenizer
    from megatron_embed.errors import CheckpointError
    from megatron_embed.loading.model_directory import find_model

    settings, words = REFUSED[name]
    path = save_directory(tmp_path / "model", **settings)
    with pytest.raises(CheckpointError) as error:
        model = find_model(str(path))
        RoleTokenizer(str(path), add_eos=False, query_max_length=16, document_max_length=16,
                      text_format=model.text_format)
    for word in words:
        assert word in str(error.value)


def test_chat_templates_with_names_of_which_none_is_the_default(tmp_path):
    from megatron_embed.data.tokenizer import RoleTokenizer
    from megatron_embed.errors import CheckpointError
    from megatron_embed.loading.model_directory import find_model

    path = save_directory(tmp_path / "model", sbert=chat("flat"))
    for templates, refused in (([("rag", FLAT), ("tool_use", FLAT)], True), ([("default", FLAT), ("rag", "x")], False)):
        with_template(path, [{"name": name, "template": text} for name, text in templates], in_config=True)
        with pytest.raises(CheckpointError) if refused else contextlib.nullcontext() as error:
            RoleTokenizer(str(path), add_eos=False, query_max_length=16, document_max_length=16,
                          text_format=find_model(str(path)).text_format)
        assert not refused or ("tokenizer_config.json: chat_template gives the tokenizer chat templates by name (rag, "
                               "tool_use), and none of them is called default" in str(error.value))


MODULES = {
    "CNN": ({"type": "sentence_transformers.models.CNN", "path": "2_CNN"}, "sentence_transformers.models.CNN"),
    "own code": ({"type": "custom_st.Transformer", "path": ""}, "custom_st.Transformer"),
    "weights": ({"type": "sentence_transformers.models.WeightedLayerPooling", "path": "1_W"}, "WeightedLayerPooling"),
    "second pooling": ({"type": "sentence_transformers.models.Pooling", "path": "1_Pooling"}, "in this order"),
    "key": ({"type": "sentence_transformers.models.Normalize", "path": "", "device": "cpu"}, "device = 'cpu'"),
    "name twice": ({"type": "sentence_transformers.models.Normalize", "path": "", "name": "1"}, "name = '1' stands at"),
    "no name": ({"type": "sentence_transformers.models.Normalize", "path": "", "name": None}, "name = None of module"),
}


@pytest.mark.parametrize("name", MODULES)
def test_modules_that_are_not_computed_are_refused_by_name(tmp_path, name):
    from megatron_embed.errors import CheckpointError
    from megatron_embed.loading.model_directory import find_model

    module, word = MODULES[name]
    path = save_directory(tmp_path / "model", normalize=False)
    values = json.loads((path / "modules.json").read_text(encoding="utf-8"))
    write(path / "modules.json", [*values, {"idx": 2, "name": "2", **module}])
    with pytest.raises(CheckpointError, match=r"modules\.json.*") as error:
        find_model(str(path))
    assert word in str(error.value)


def test_a_transformer_in_its_own_folder_is_converted_without_it(directories, ours, tmp_path):
    from megatron_embed.convert.convert import hf_to_megatron, megatron_to_hf

    assert abs(ours["own-folder"]["query"] - ours["plain"]["query"]).max() == 0
    hf_to_megatron(directories["own-folder"], tmp_path / "checkpoint")
    megatron_to_hf(tmp_path / "checkpoint", tmp_path / "back")
    plain = Path(directories["plain"])
    assert_bit_equal(tensors_of(tmp_path / "back"), tensors_of(plain))
    for file in ("modules.json", "tokenizer.json", "sentence_bert_config.json"):
        same = json.loads if file == "modules.json" else bytes
        assert same((tmp_path / "back" / file).read_bytes()) == same((plain / file).read_bytes()), file
    assert not (tmp_path / "back" / "0_Transformer").exists()


def test_a_module_that_normalizes_something_else_is_refused(tmp_path):
    from megatron_embed.errors import CheckpointError
    from megatron_embed.loading.model_directory import find_model

    path = save_directory(tmp_path / "model")
    write(path / "2_Normalize" / "config.json", {"module_input_name": "token_embeddings"})
    with pytest.raises(CheckpointError, match="module_input_name = 'token_embeddings'"):
        find_model(str(path))


def test_published_directory_passes():
    from megatron_embed.models.saved_settings import read_saved_settings

    saved = read_saved_settings(MINILM)
    assert (saved.pooling, saved.normalize, saved.similarity) == ("mean", True, "cosine")


def save_adapter(path, init):
    from tests.helpers.adapter_reference import write_adapter

    path.mkdir(parents=True)
    write_adapter(path, model_of("qwen3"))
    change(path / "adapter_config.json", init_lora_weights=init, loftq_config={"loftq_bits": 4, "loftq_iter": 1})
    return path


def peft_vectors(path):
    """Token vectors of the adapted model as PEFT loads it."""
    import torch
    from peft import PeftModel
    from transformers import AutoModel

    model = PeftModel.from_pretrained(AutoModel.from_pretrained(model_of("qwen3"), dtype=torch.float32), path).eval()
    with torch.no_grad():
        return model(input_ids=torch.tensor([[5, 6, 7, 8]])).last_hidden_state.numpy()


def test_initializations_that_leave_the_base_alone_pass(tmp_path):
    from megatron_embed.loading.model_directory import find_model

    expected = peft_vectors(save_adapter(tmp_path / "true", True))
    for init in (False, "gaussian", "eva", "orthogonal", "mica", None):
        path = save_adapter(tmp_path / str(init), init)
        if init != "eva":  # which PEFT loads with its own settings alone
            np.testing.assert_allclose(peft_vectors(path), expected, atol=1e-6, err_msg=str(init))
        assert find_model(str(path)).adapters == find_model(str(tmp_path / "true")).adapters


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora", "OLoRA", "corda", "loftq", "lora_ga", "new"])
def test_initializations_that_change_the_base_are_refused(tmp_path, init):
    from megatron_embed.errors import CheckpointError
    from megatron_embed.loading.model_directory import find_model

    path = save_adapter(tmp_path / "adapter", init)
    if init in ("pissa", "pissa_niter_4", "olora"):
        expected = peft_vectors(save_adapter(tmp_path / "true", True))
        assert abs(peft_vectors(path) - expected).max() > 1e-2
    with pytest.raises(CheckpointError, match=rf"adapter_config\.json: init_lora_weights = '{init}'.*merge_and_unload"):
        find_model(str(path))


def test_an_adapter_s_own_tokenizer_is_read(tmp_path):
    from megatron_embed.loading.model_directory import find_model

    path = save_adapter(tmp_path / "adapter", True)
    assert find_model(str(path)).tokenizer_directory == model_of("qwen3")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(model_of("qwen3") / name, path)
    change(path / "tokenizer_config.json", truncation_side="left", add_eos_token=True)
    model = find_model(str(path))
    assert (model.tokenizer_directory, model.saved.truncation_side, model.saved.adds_eos) == (path, "left", True)
