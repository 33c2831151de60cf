"""Cross-encoders that other programs wrote are scored as the stock library scores them, or refused with a sentence."""

import functools
import json

import pytest
import transformers

from tests.helpers import foreign_rerankers as toys
from tests.helpers.foreign_rerankers import decoder, encoder, own_scores, saved
from tests.helpers.ranks import run_on_ranks

IDENTITY, SIGMOID = toys.ACTIVATION["identity"], toys.ACTIVATION["sigmoid"]
LONG_QUERY = "what is a quick fox and why " * 20
LONG = ("no activation", "max_seq_length", "decoder without template")
"""The cases that are scored for it, too."""


def without_padding_token(path):
    """A tokenizer whose padding token is its EOS, which it puts after every pair; config.json pads with the same."""
    decoder(path)
    tokenizer = toys.read(path / "tokenizer.json")
    end = {"SpecialToken": {"id": "<|im_end|>", "type_id": 0}}
    sequence = [{"Sequence": {"id": name, "type_id": 0}} for name in "AB"]
    token_id = next(token["id"] for token in tokenizer["added_tokens"] if token["content"] == "<|im_end|>")
    tokenizer["post_processor"] = {
        "type": "TemplateProcessing", "single": [sequence[0], end], "pair": [*sequence, end],
        "special_tokens": {"<|im_end|>": {"id": "<|im_end|>", "ids": [token_id], "tokens": ["<|im_end|>"]}}}
    (path / "tokenizer.json").write_text(json.dumps(tokenizer))
    toys.edit(path / "tokenizer_config.json", pad_token="<|im_end|>")
    toys.edit(path / "config.json", pad_token_id=token_id)


def encoder_with_case(path):
    """A tokenizer that tells upper from lower case."""
    encoder(path)
    tokenizer = toys.read(path / "tokenizer.json")
    tokenizer["normalizer"]["lowercase"] = False
    (path / "tokenizer.json").write_text(json.dumps(tokenizer))
    toys.edit(path / "tokenizer_config.json", do_lower_case=False)
    return path


def without_second_type(path):
    """The tokenizer gives the document type 1, which the model does not have."""
    shape = transformers.XLMRobertaConfig(
        vocab_size=30522, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=700, type_vocab_size=1, num_labels=1, pad_token_id=0)
    transformers.XLMRobertaForSequenceClassification(shape).save_pretrained(path)
    toys.copy_tokenizer(path)


def answers(path):
    """A causal language model with a LogitScore of other words than yes and no."""
    decoder(path, "Qwen3ForCausalLM", jinja=toys.PROMPTED_JINJA)
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    ids = [tokenizer(word, add_special_tokens=False).input_ids[0] for word in ("1", " no")]
    return saved(path, message="flat", answers=ids, activation_fn=IDENTITY,
                 settings={"processing_kwargs": {"chat_template": {"add_generation_prompt": True}}})


block = {"activation_fn": IDENTITY, "version": "4.1.0"}
EQUAL = {
    "no activation": encoder,
    "identity of 4.x": functools.partial(encoder, sentence_transformers=block),
    "sigmoid of 4.x": functools.partial(encoder, sentence_transformers=block | {"activation_fn": "torch.nn.Sigmoid"}),
    "identity before 4": functools.partial(encoder, sbert_ce_default_activation_function=IDENTITY),
    "both, the newer counts": functools.partial(encoder, sentence_transformers={"activation_fn": None},
                                                sbert_ce_default_activation_function=IDENTITY),
    "identity of 5.x before 4.x's": lambda path: saved(
        encoder(path, sentence_transformers={"activation_fn": SIGMOID}), activation_fn=IDENTITY),
    "not saved as a cross-encoder": lambda path: saved(
        encoder(path, sentence_transformers=block), model_type="SentenceTransformer", activation_fn=SIGMOID,
        default_prompt_name="a", prompts={"a": "judge: "}),
    "prompt of an encoder": lambda path: saved(
        encoder(path), prompts={"a": "judge: ", "b": "other: "}, default_prompt_name="a"),
    "prompts without a default": lambda path: saved(encoder(path), prompts={"a": "judge: "}),
    "max_seq_length": lambda path: saved(encoder(path), settings={"max_seq_length": 24}),
    "model_max_length": lambda path: toys.edit(encoder(path) / "tokenizer_config.json", model_max_length=20),
    "truncation at the left": lambda path: toys.edit(
        encoder(path) / "tokenizer_config.json", truncation_side="left", model_max_length=20),
    "lowercased": lambda path: saved(encoder_with_case(path), settings={"do_lower_case": True}),
    "decoder without template": decoder,
    "decoder without template, saved": lambda path: saved(decoder(path), activation_fn=IDENTITY),
    "template that is not used": lambda path: saved(decoder(path, jinja=toys.PLAIN_JINJA)),
    "prompt of a decoder without template": lambda path: saved(
        decoder(path), prompts={"a": "judge: "}, default_prompt_name="a"),
    "scored before the end": without_padding_token,
    "own template": lambda path: decoder(path, jinja=toys.PLAIN_JINJA),
    "own template, saved": lambda path: saved(decoder(path, jinja=toys.PLAIN_JINJA), message="flat"),
    "own template, cut": lambda path: saved(decoder(path, jinja=toys.PLAIN_JINJA), message="flat",
                                            settings={"max_seq_length": 40}),
    "own structured template": lambda path: decoder(path, jinja=toys.STRUCTURED_JINJA),
    "own template with an instruction": lambda path: saved(
        decoder(path, jinja=toys.PROMPTED_JINJA), message="auto", prompts={"web": "Find it"}, activation_fn=IDENTITY),
    "own template with a prompt": lambda path: saved(
        decoder(path, jinja=toys.PROMPTED_JINJA), message="auto", prompts={"web": "Find it"},
        default_prompt_name="web", activation_fn=IDENTITY),
    "the default of several templates": lambda path: saved(
        toys.named_templates(decoder(path), {"default": toys.PLAIN_JINJA, "rag": "x"}), message="flat"),
    "the structured default of several templates": lambda path: toys.named_templates(
        decoder(path), {"default": toys.STRUCTURED_JINJA, "rag": "x"}, in_config=True),
    "causal language model": lambda path: decoder(path, "Qwen3ForCausalLM", jinja=toys.PROMPTED_JINJA),
    "causal language model without template": lambda path: decoder(path, "Qwen3ForCausalLM"),
    "other answers": answers,
}
REFUSED = {
    "activation of torch that is not computed": (
        functools.partial(encoder, sentence_transformers={"activation_fn": "torch.nn.modules.activation.Tanh"}),
        ("config.json: sentence_transformers.activation_fn = 'torch.nn.modules.activation.Tanh'",)),
    "activation of the directory's code": (
        lambda path: saved(encoder(path), activation_fn="evil.run"),
        ("config_sentence_transformers.json: activation_fn = 'evil.run'",)),
    "activation before 4 that is code": (
        functools.partial(encoder, sbert_ce_default_activation_function="os.system"),
        ("sbert_ce_default_activation_function = 'os.system'",)),
    "three outputs": (
        functools.partial(encoder, id2label={"0": "a", "1": "b", "2": "c"}), ("id2label", "3 outputs")),
    "unknown default prompt": (
        lambda path: saved(encoder(path), prompts={"a": "b"}, default_prompt_name="c"), ("default_prompt_name = 'c'",)),
    "template without the document": (
        lambda path: decoder(path, jinja="{{ messages[0].content }}"), ("does not render", "document")),
    "template that raises": (
        lambda path: decoder(path, jinja="{{ raise_exception('Only user') }}"), ("does not render", "Only user")),
    "template that trims": (
        lambda path: decoder(path, jinja="{{ messages[0].content | trim }} {{ messages[1].content }}"),
        ("does more to",)),
    "template with the document first": (
        lambda path: decoder(path, jinja="{{ messages[1].content }} {{ messages[0].content }}"),
        ("{document} comes before {query}",)),
    "templates with names and no default": (
        lambda path: toys.named_templates(decoder(path), {"rerank": toys.PLAIN_JINJA, "rag": "x"}),
        ("/additional_chat_templates gives the tokenizer chat templates by name (", "none of them is called default",
         "put the one that is meant alone into chat_template.jinja")),
    "a template with a name in the configuration": (
        lambda path: saved(toys.named_templates(decoder(path), {"rerank": toys.PLAIN_JINJA}, in_config=True),
                           message="flat"),
        ("tokenizer_config.json: chat_template gives the tokenizer chat templates by name (rerank), and none of",)),
    "templates with names into which the library does not look": (
        lambda path: toys.named_templates(decoder(path), {"default": toys.PLAIN_JINJA, "rag": "x"}),
        ("chat templates by name (default, rag); of several templates CrossEncoder does not see that default takes",)),
    "message without a template": (
        lambda path: saved(decoder(path), message="flat"), ("modality message", "no chat template")),
    "other modules": (
        lambda path: (saved(encoder(path)) / "modules.json").write_text(json.dumps(
            [{"name": "0", "type": "sentence_transformers.base.modules.transformer.Transformer", "path": ""},
             {"name": "1", "type": "mine.Dense", "path": "2"}])), ("modules.json", "Dense")),
    "one answer alone": (
        lambda path: saved(decoder(path, "Qwen3ForCausalLM"), answers=(5, None)), ("false_token_id = None",)),
    "answer outside the folder": (
        lambda path: (answers(path) / "modules.json").write_text(
            (path / "modules.json").read_text().replace("1_LogitScore", "../other")), ("'../other'",)),
    "our own file, damaged": (
        lambda path: toys.edit(encoder(path) / "reranker.json", head="score", template=7, instruction="",
                               true_token="a", false_token="b", max_length=20, activation="identity"),
        ("reranker.json: not readable (template = 7)",)),
    "no classifier at all": (
        lambda path: saved(encoder(path, architectures=["BertModel"])), ("architectures = ['BertModel']",)),
    "a token type that the model lacks": (without_second_type, ("token type 1", "type_vocab_size = 1")),
    "arguments of the tokenizer": (
        lambda path: saved(encoder(path), settings={"processing_kwargs": {"text": {"truncation": False}}}),
        ("processing_kwargs.text.truncation",)),
}


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    """By name: what our model gives, and the directory."""
    folder = tmp_path_factory.mktemp("foreign")
    builders = EQUAL | {name: build for name, (build, _) in REFUSED.items()}
    folders = {name: folder / f"{index:02}" for index, name in enumerate(builders)}
    for name, build in builders.items():
        build(folders[name])
    cases = [(str(folders[name]), toys.QUERY) for name in builders]
    cases += [(str(folders[name]), LONG_QUERY) for name in LONG]
    (all_scores,) = run_on_ranks(own_scores, 1, cases)
    names = [*builders, *(f"{name}, long query" for name in LONG)]
    return {name: (scores, directory, query)
            for name, scores, (directory, query) in zip(names, all_scores, cases, strict=True)}


@pytest.mark.parametrize("name", [*EQUAL, *(f"{name}, long query" for name in LONG)])
def test_scores_are_the_stock_librarys(scored, name):
    ours, directory, query = scored[name]
    assert not isinstance(ours, str), ours
    theirs = toys.stock_scores(directory, query)
    assert theirs.std() > 1e-4
    assert ours == pytest.approx(theirs.tolist(), abs=1e-5, rel=1e-5)


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_computed_is_refused(scored, name):
    sentence, directory, _ = scored[name]
    assert isinstance(sentence, str), "scored all the same"
    assert directory in sentence and ";" in sentence
    for words in REFUSED[name][1]:
        assert words in sentence
