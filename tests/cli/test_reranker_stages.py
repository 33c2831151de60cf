"""A reranker that is trained on from a cross-encoder's directory stays what that says, in one stage and in two."""

import logging

import pytest

from megatron_embed.config.load import load_config
from megatron_embed.data.pair_tokenizer import QWEN3_RERANKER_TEMPLATE
from megatron_embed.errors import CheckpointError, ConfigError
from megatron_embed.run.preflight import read_inputs
from tests.helpers import foreign_rerankers as toys
from tests.helpers.foreign_rerankers import decoder, encoder, own_scores, saved
from tests.helpers.ranks import run_on_ranks
from tests.helpers.refusals import command
from tests.helpers.reranker_runs import run_settings
from tests.helpers.toys import save_reranker

IDENTITY = toys.ACTIVATION["identity"]


def trained(model, folder, **sections):
    """The export of one step that moves nothing."""
    folder.mkdir()
    config = run_settings(str(model), folder, head=None, training={"train_steps": 1, "learning_rate": 1e-30}, data={
        "query_max_length": None, "document_max_length": None},
        checkpoint={"directory": str(folder / "run"), "export_at_end": str(folder / "export")}, **sections)
    ((code, _, err, _),) = run_on_ranks(command, 1, ["train", config])
    assert code == 0, err
    return folder / "export"


STAGES = {
    "encoder": (lambda path: saved(
        encoder(path), activation_fn=IDENTITY, prompts={"a": "judge: ", "b": "x"}, default_prompt_name="a",
        settings={"max_seq_length": 100}), 2),
    "own template": (lambda path: saved(
        decoder(path, jinja=toys.PROMPTED_JINJA), message="auto", activation_fn=IDENTITY, prompts={"w": "Find it"},
        default_prompt_name="w"), 1),
    "no template": (lambda path: decoder(path), 1),
}


@pytest.mark.parametrize("name", STAGES)
def test_nothing_that_is_not_set_changes(tmp_path, name):
    build, stages = STAGES[name]
    model = build(tmp_path / "model")
    expected = toys.stock_scores(model)
    export = model
    for stage in range(stages):
        export = trained(export, tmp_path / f"stage{stage}")
        assert toys.stock_scores(export) == pytest.approx(expected, abs=1e-5, rel=1e-5)
    (ours,) = run_on_ranks(own_scores, 1, [(str(export), toys.QUERY)])
    assert ours[0] == pytest.approx(expected.tolist(), abs=1e-5, rel=1e-5)
    if name == "encoder":
        settings = toys.read(export / "config_sentence_transformers.json")
        assert settings["prompts"] == {"a": "judge: ", "b": "x"} and settings["default_prompt_name"] == "a"
        assert toys.read(export / "reranker.json")["max_length"] == 100


def settings_of(folder, model, **sections):
    return read_inputs(load_config(run_settings(str(model), folder, **{"head": None, **sections}), [])).task.settings


def test_what_is_set_takes_the_place_of_the_directorys(tmp_path, caplog):
    caplog.set_level(logging.INFO, "megatron_embed")
    model = saved(decoder(tmp_path / "model", jinja=toys.PLAIN_JINJA), message="flat", activation_fn=IDENTITY,
                  settings={"max_seq_length": 300})
    unset = {"query_max_length": None, "document_max_length": None}
    kept = settings_of(tmp_path, model, data=unset)
    assert (kept.head, kept.activation, kept.max_length) == ("score", "identity", 300)
    assert kept.template == "Task: judge. Q={query} D={document} Answer:"
    (line,) = (message for message in caplog.messages if "not set, so as" in message)
    for words in (str(model), "reranker.head = 'score'", "activation = 'identity'", "max_length = 300", "D={document}"):
        assert words in line
    caplog.clear()
    template = "q: {query} d: {document} i: {instruction}"
    other = settings_of(tmp_path, model, reranker={
        "template": template, "activation": "sigmoid", "instruction": "so", "max_length": 200})
    assert (other.template, other.activation, other.instruction, other.max_length) == (template, "sigmoid", "so", 200)
    assert "activation" not in caplog.text and "template" not in caplog.text
    assert settings_of(tmp_path, model).max_length == 450  # data.query_max_length + data.document_max_length are set


def test_a_causal_language_model_that_is_no_reranker_gets_our_prompt(tmp_path):
    for index, jinja in enumerate((None, "{{ messages[0].content }}")):
        saved = settings_of(tmp_path, decoder(tmp_path / str(index), "Qwen3ForCausalLM", jinja=jinja))
        assert (saved.head, saved.template, saved.activation) == ("yes_no", QWEN3_RERANKER_TEMPLATE, "sigmoid")
    saved = settings_of(tmp_path, decoder(tmp_path / "own", "Qwen3ForCausalLM", jinja=toys.PLAIN_JINJA))
    assert saved.template == "Task: judge. Q={query} D={document} Answer:"


def test_a_classifier_whose_template_carries_no_pair_needs_one(tmp_path):
    model = decoder(tmp_path / "model", jinja="{{ messages[0].content }}")
    with pytest.raises(CheckpointError, match=r"carries no pair .* chat_template.jinja"):
        settings_of(tmp_path, model)
    assert settings_of(tmp_path, model, reranker={"template": "{query} {document} ="}).head == "score"


def ending(path, **tokens):
    """A base model whose tokenizer pads with, and ends with, these."""
    save_reranker(path, "Qwen3ForCausalLM", tied=False)
    toys.edit(path / "tokenizer_config.json", **tokens)
    return path


AT_THE_END = {
    "padding token": ({}, "q: {query} d: {document}<|endoftext|>"),
    "an EOS that pads": ({"pad_token": "<|im_end|>"}, "{query} {document} =<|im_end|>"),
    "an EOS, no padding token": ({"pad_token": None}, "{query}{document}\n<|im_end|>"),
    "twice": ({}, "{query}{document}<|endoftext|><|endoftext|>"),
    "the padding side": ({"padding_side": "left"}, "{query}{document}<|endoftext|>"),
}


@pytest.mark.parametrize("head", ["yes_no", "score"])
@pytest.mark.parametrize("name", AT_THE_END)
def test_a_template_that_ends_with_padding_is_refused(tmp_path, name, head):
    tokens, template = AT_THE_END[name]
    model = ending(tmp_path / "model", **tokens)
    with pytest.raises(ConfigError, match=r"^reranker.template = .* its last token .* another pad_token"):
        settings_of(tmp_path, model, head=head, reranker={"template": template})
    settings_of(tmp_path, model, head=head, reranker={"template": template + "\n"})


def test_a_directorys_template_that_ends_with_padding_is_refused(tmp_path):
    model = saved(decoder(tmp_path / "model", jinja=toys.PLAIN_JINJA.replace(" Answer:", "<|endoftext|>")),
                  message="flat")
    with pytest.raises(ConfigError, match=r"^model.path = .*its template = .* its last token"):
        settings_of(tmp_path, model)


def test_a_run_goes_on_as_it_was_asked(tmp_path):
    """The directory that it began with says something else by now."""
    model = saved(encoder(tmp_path / "model"), activation_fn=IDENTITY)
    trained(model, tmp_path / "stage")
    toys.edit(model / "config_sentence_transformers.json", activation_fn=toys.ACTIVATION["sigmoid"])
    config = tmp_path / "stage" / "run.yaml"
    assert read_inputs(load_config(str(config), [])).task.settings.activation == "identity"
    with pytest.raises(ConfigError, match="reranker.max_length = 64: this run began with 128"):
        read_inputs(load_config(str(config), ["reranker.max_length=64"]))
    read_inputs(load_config(str(config), ["reranker.max_length=128", "reranker.head=score"]))
