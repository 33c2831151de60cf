"""Vectors of Sentence Transformers for an export, on toy models with tokenizers built here."""

import json

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModel, AutoTokenizer

from megatron_embed.convert.merge_match import _vocabulary
from megatron_embed.errors import CheckpointError
from megatron_embed.export.sentence_transformers import export_sentence_transformers
from megatron_embed.export.verify import compare_with_sentence_transformers
from tests.helpers.toys import MINILM, save_toy

TEXTS = ["alpha beta", "gamma", "beta beta alpha gamma delta alpha beta gamma alpha beta gamma", "delta alpha"]
WORDS = ["[UNK]", "<eos>", "<pad>", "<bos>", "alpha", "beta", "gamma", "delta", "query", ":", "user"]
BOS = processors.TemplateProcessing("<bos> $A", "<bos> $A <bos> $B", [("<bos>", 3)])
EOS = processors.TemplateProcessing("$A <eos>", "$A <eos> $B <eos>", [("<eos>", 1)])
BYTES = processors.ByteLevel(trim_offsets=False)
POST_PROCESSORS = {
    "none": (None, [], [1]), "bos": (BOS, [3], [1]), "adds its own eos": (EOS, [], [1]), "byte level": (BYTES, [], [1]),
    "sequence with bos": (processors.Sequence([BYTES, BOS]), [3], [1]),
    "sequence without template": (processors.Sequence([BYTES]), [], [1])}


def save_tokenizer(path, post_processor=None, **settings):
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if post_processor is not None:
        tokenizer.post_processor = post_processor
    tokenizer.add_special_tokens(["<eos>", "<pad>", "<bos>"])
    tokenizer.save(str(path / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 64, "eos_token": "<eos>",
              "pad_token": "<pad>"}
    (path / "tokenizer_config.json").write_text(json.dumps(
        {key: value for key, value in (config | settings).items() if value is not None}))


def export(path, **settings):
    defaults = {"pooling": "lasttoken", "normalize": True, "query_prompt": "query : ", "document_prompt": "",
                "max_seq_length": 8, "embedding_dimension": 24}
    export_sentence_transformers(path, **defaults | settings)


def decoder(path, post_processor=None, **settings):
    save_toy(path, "Qwen3Model")
    save_tokenizer(path, post_processor, **settings)
    return path


def embed_one_by_one(path, texts, pooling, normalize, begin=(), end=(), limit=8):
    """The reference: each text alone, never padded, cut so that the tokens at its ends stay."""
    tokenizer, model = AutoTokenizer.from_pretrained(path), AutoModel.from_pretrained(path, dtype=torch.float32)
    vectors = []
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False).input_ids[:limit - len(begin) - len(end)]
        with torch.no_grad():
            hidden = model(torch.tensor([[*begin, *ids, *end]])).last_hidden_state[0]
        weights = torch.arange(1.0, len(hidden) + 1)[:, None]
        vector = {"lasttoken": hidden[-1], "cls": hidden[0], "mean": hidden.mean(0),
                  "weightedmean": (hidden * weights).sum(0) / weights.sum()}[pooling]
        vectors.append(torch.nn.functional.normalize(vector, dim=0) if normalize else vector)
    return torch.stack(vectors)


@pytest.mark.parametrize("name", POST_PROCESSORS)
@pytest.mark.parametrize("side", ["right", "left"])
def test_last_token_export_sees_the_ids_of_training(name, side, tmp_path):
    post_processor, begin, end = POST_PROCESSORS[name]
    decoder(tmp_path, post_processor, padding_side=side)
    expected = embed_one_by_one(tmp_path, TEXTS, "lasttoken", True, begin, end)
    export(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path)(TEXTS[0]).input_ids == [*begin, 4, 5, *end]
    pair = AutoTokenizer.from_pretrained(tmp_path)("alpha", "beta").input_ids
    assert (pair[-1], pair.count(1)) == (1, 2 if name == "adds its own eos" else 1)
    report = compare_with_sentence_transformers(tmp_path, TEXTS, expected, minimum_cosine=0.99999)
    assert report.max_difference < 1e-5
    assert report.count == 4


@pytest.mark.parametrize("pooling", ["mean", "cls", "weightedmean"])
@pytest.mark.parametrize("normalize", [True, False])
def test_other_poolings_leave_the_tokenizer_alone(pooling, normalize, tmp_path):
    decoder(tmp_path)
    before = (tmp_path / "tokenizer.json").read_bytes()
    expected = embed_one_by_one(tmp_path, TEXTS, pooling, normalize)
    export(tmp_path, pooling=pooling, normalize=normalize)
    assert (tmp_path / "tokenizer.json").read_bytes() == before
    report = compare_with_sentence_transformers(tmp_path, TEXTS, expected, minimum_cosine=0.99999)
    assert report.max_difference < 1e-5
    assert (tmp_path / "2_Normalize").exists() == normalize


@pytest.mark.parametrize("pooling", ["mean", "lasttoken"])
def test_a_tokenizer_as_large_as_those_of_100_languages_is_written(pooling, tmp_path):
    """XLM-RoBERTa's tokenizer.json has 17,082,730 bytes, more than any other JSON file of a model may have."""
    decoder(tmp_path)
    file = tmp_path / "tokenizer.json"
    values = json.loads(file.read_text(encoding="utf-8"))
    values["truncation"] = {"direction": "Left", "max_length": 8, "strategy": "LongestFirst", "stride": 0}
    file.write_text(json.dumps(values) + " " * (17 << 20), encoding="utf-8")
    export(tmp_path, pooling=pooling)
    assert json.loads(file.read_text(encoding="utf-8"))["truncation"]["direction"] == "Right"
    assert _vocabulary(tmp_path)


def test_layout_is_the_legacy_one(tmp_path):
    decoder(tmp_path)
    export(tmp_path, document_prompt="doc : ")
    read = lambda name: json.loads((tmp_path / name).read_text())  # noqa: E731
    assert [(module["path"], module["type"]) for module in read("modules.json")] == [
        ("", "sentence_transformers.models.Transformer"), ("1_Pooling", "sentence_transformers.models.Pooling"),
        ("2_Normalize", "sentence_transformers.models.Normalize")]
    assert read("1_Pooling/config.json") == {
        "word_embedding_dimension": 24, "pooling_mode_cls_token": False, "pooling_mode_mean_tokens": False,
        "pooling_mode_max_tokens": False, "pooling_mode_mean_sqrt_len_tokens": False,
        "pooling_mode_weightedmean_tokens": False, "pooling_mode_lasttoken": True, "include_prompt": True}
    assert read("sentence_bert_config.json") == {"max_seq_length": 8, "do_lower_case": False}
    settings = read("config_sentence_transformers.json")
    assert settings["prompts"] == {"query": "query : ", "document": "doc : "}
    assert settings["similarity_fn_name"] == "cosine"


def test_prompts_and_chat_template(tmp_path):
    """A chat template must not turn plain texts into messages, as Sentence Transformers 6 does in a bare directory."""
    decoder(tmp_path)
    template = "{% for message in messages %}user {{ message['content'] }}{% endfor %}"
    (tmp_path / "chat_template.jinja").write_text(template)
    plain = embed_one_by_one(tmp_path, TEXTS, "lasttoken", True, end=[1])
    queries = embed_one_by_one(tmp_path, ["query : " + text for text in TEXTS], "lasttoken", True, end=[1])
    export(tmp_path)
    compare_with_sentence_transformers(tmp_path, TEXTS, plain, minimum_cosine=0.99999)
    compare_with_sentence_transformers(tmp_path, TEXTS, queries, minimum_cosine=0.99999, prompt_name="query")
    with pytest.raises(CheckpointError, match=r"has cosine .* below 0.99999; the export must not be used"):
        compare_with_sentence_transformers(tmp_path, TEXTS, plain, minimum_cosine=0.99999, prompt_name="query")


def test_a_tokenizer_without_padding_gets_one(tmp_path):
    decoder(tmp_path, pad_token=None)
    expected = embed_one_by_one(tmp_path, TEXTS, "lasttoken", True, end=[1])
    export(tmp_path)
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["pad_token"] == "<eos>"
    compare_with_sentence_transformers(tmp_path, TEXTS, expected, minimum_cosine=0.99999)


def test_files_of_an_earlier_life_are_replaced(tmp_path):
    decoder(tmp_path)
    export(tmp_path, normalize=True)
    (tmp_path / "3_Dense").mkdir()
    modules = json.loads((tmp_path / "modules.json").read_text())
    modules.append({"idx": 3, "name": "3", "path": "3_Dense", "type": "sentence_transformers.models.Dense"})
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    export(tmp_path, normalize=False, pooling="mean")
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {"1_Pooling"}
    assert json.loads((tmp_path / "config_sentence_transformers.json").read_text())["similarity_fn_name"] == "dot"


@pytest.mark.parametrize("settings, match", [
    ({"eos_token": None}, "names no eos_token, which last-token pooling needs"),
    ({"eos_token": None, "pad_token": None}, "neither pad_token nor eos_token")])
def test_tokenizers_that_cannot_serve_are_refused(settings, match, tmp_path):
    decoder(tmp_path, **settings)
    with pytest.raises(CheckpointError, match=match):
        export(tmp_path)


def test_a_directory_without_tokenizer_is_refused(tmp_path):
    save_toy(tmp_path, "Qwen3Model")
    with pytest.raises(CheckpointError, match="makes no token of .*; put the model's tokenizer files there"):
        export(tmp_path)


def test_bfloat16_is_the_directorys_own_dtype(tmp_path):
    save_toy(tmp_path, "Qwen3Model", dtype=torch.bfloat16)
    save_tokenizer(tmp_path)
    expected = embed_one_by_one(tmp_path, TEXTS, "mean", True)
    export(tmp_path, pooling="mean")
    full = compare_with_sentence_transformers(tmp_path, TEXTS, expected, minimum_cosine=0.99999, dtype="float32")
    half = compare_with_sentence_transformers(tmp_path, TEXTS, expected, minimum_cosine=0.999)
    assert full.max_difference < 1e-5 < half.max_difference


def test_comparison_notices_one_other_vector_nan_and_shape(tmp_path):
    texts = ["a man is eating food", "the weather in Paris", "training large models"]
    from sentence_transformers import SentenceTransformer

    ours = SentenceTransformer(str(MINILM), device="cpu").encode(texts, convert_to_tensor=True)
    report = compare_with_sentence_transformers(MINILM, texts, ours, minimum_cosine=0.9999)
    assert report.minimum_cosine > 0.999999
    assert str(report).startswith("Sentence Transformers gives the same vectors for 3 texts: cosine >= 1.000000")
    other = ours.clone()
    other[1] = -other[1]
    with pytest.raises(CheckpointError, match=r"text 1 \('the weather in Paris'\) has cosine -1.0000"):
        compare_with_sentence_transformers(MINILM, texts, other, minimum_cosine=0.9999)
    other[1] = float("nan")
    with pytest.raises(CheckpointError, match=r"text 1 .* has cosine nan"):
        compare_with_sentence_transformers(MINILM, texts, other, minimum_cosine=0.9999)
    with pytest.raises(CheckpointError, match=r"vectors of shape \[3, 384\], the trained model \[3, 128\]"):
        compare_with_sentence_transformers(MINILM, texts, ours[:, :128], minimum_cosine=0.9999)


def test_what_the_library_cannot_load_is_refused(tmp_path):
    save_toy(tmp_path, "Qwen3Model")
    with pytest.raises(CheckpointError, match="Sentence Transformers cannot use it"):
        compare_with_sentence_transformers(tmp_path, ["a"], torch.zeros(1, 24), minimum_cosine=0.9)
