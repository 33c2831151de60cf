"""`convert megatron-to-hf`: its options, its report, and exports that are other models: refused, nothing left."""

import json
import shutil
from contextlib import ExitStack
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file

from megatron_embed.cli.convert import FORMATS
from megatron_embed.convert.convert import hf_to_megatron
from tests.helpers.ranks import run_on_ranks
from tests.helpers.refusals import command
from tests.helpers.toys import MINILM, save_model, save_toy


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Our checkpoints of a decoder with tokenizer, of one without, and of a real encoder."""
    folder = tmp_path_factory.mktemp("export")
    hf_to_megatron(save_model(folder / "hf", "qwen3", tokenizer=True), folder / "qwen3")
    hf_to_megatron(save_toy(folder / "bare", "Qwen3Model"), folder / "tokenizerless")
    hf_to_megatron(MINILM, folder / "minilm")
    return folder


def convert(source, target, *options):
    return ["convert", "megatron-to-hf", str(source), str(target), *options]


def converted(source, target, *options):
    ((code, out, err, _),) = run_on_ranks(command, 1, convert(source, target, *options))
    assert code == 0, err
    return out.splitlines()


def assert_refused(results, *words):
    """One line that holds the words, exit code 2."""
    ((code, out, err, _),) = results
    assert (code, out) == (2, ""), err
    (line,) = [line for line in err.splitlines() if line.startswith("megatron-embed: error: ")]
    assert "Traceback" not in err
    for word in words:
        assert word in line


def test_every_format_has_its_function():
    from megatron_embed.export.formats import EXPORTERS

    assert EXPORTERS.keys() == FORMATS.keys()


def test_a_plain_export_is_loaded_and_compared(checkpoints, tmp_path):
    for name in ("qwen3", "minilm"):
        comparison, report = converted(checkpoints / name, tmp_path / name)
        assert comparison.startswith("Transformers gives the same vectors for 7 texts: cosine >= 1.000000"), comparison
        assert report.startswith(f"{tmp_path / name}: ")
        for words in (" tensors, ", " GB/s), peak memory ", "every tensor read back bit-equal"):
            assert words in report
        card = (tmp_path / name / "README.md").read_text()
        own = checkpoints / name / "hf" / "README.md"
        for words in ["AutoModel.from_pretrained", f"# {name}\n", "does not say how it was trained"]:
            assert words in card or own.is_file()
        assert not own.is_file() or card == own.read_text(), "a model that was not trained keeps its card"


def test_shards_and_dtype_are_what_was_asked_for(checkpoints, tmp_path):
    options = ["--max-shard-size", "1MB", "--dtype", "bfloat16"]
    comparison, report = converted(checkpoints / "qwen3", tmp_path / "half", *options)
    assert "Transformers gives the same vectors" in comparison
    assert "cosine >= 1.000000" not in comparison
    assert ", bfloat16, " in report
    shards = sorted((tmp_path / "half").glob("model-*.safetensors"))
    assert len(shards) > 1
    tensors = {name: tensor for shard in shards for name, tensor in load_file(shard).items()}
    expected = load_file(checkpoints / "hf" / "model.safetensors")
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], tensor.bfloat16()) for name, tensor in expected.items())
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"
    assert_refused(run_on_ranks(command, 1, convert(checkpoints / "qwen3", tmp_path / "x", "--max-shard-size", "big")),
                   "max_shard_size = 'big'", "5GB")
    assert not (tmp_path / "x").exists()


def convert_with_little_memory(arguments):
    with mock.patch("megatron_embed.export.verified_write.available_memory", return_value=1000):
        return command(arguments)


@pytest.mark.parametrize("output", ["hf", "sentence-transformers"])
def test_what_is_not_compared_is_said(output, checkpoints, tmp_path):
    note, _ = converted(checkpoints / "qwen3", tmp_path / "a", "--format", output, "--no-compare")
    assert note == "not loaded with the stock library and compared on texts (--no-compare)"
    arguments = convert(checkpoints / "qwen3", tmp_path / "b", "--format", output)
    ((code, out, err, _),) = run_on_ranks(convert_with_little_memory, 1, arguments)
    assert code == 0, err
    assert "not loaded with the stock library and compared on texts: that takes 0.0 GB of memory" in out
    assert ((tmp_path / "a" / "model.safetensors").read_bytes()
            == (tmp_path / "b" / "model.safetensors").read_bytes())


def test_a_model_without_tokenizer_is_exported_uncompared(checkpoints, tmp_path):
    note, _ = converted(checkpoints / "tokenizerless", tmp_path / "out")
    assert note == "not compared on texts: there are no tokenizer files"


def test_a_module_that_we_do_not_compute_passes_through_uncompared(checkpoints, tmp_path):
    source = shutil.copytree(checkpoints / "qwen3", tmp_path / "source")
    modules = [{"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
               {"idx": 1, "name": "1", "path": "1_LSTM", "type": "sentence_transformers.models.LSTM"}]
    (source / "hf" / "modules.json").write_text(json.dumps(modules))
    note, _ = converted(source, tmp_path / "out")
    assert note.startswith("not compared on texts: ")
    assert "models.LSTM' is not supported" in note
    assert json.loads((tmp_path / "out" / "modules.json").read_text()) == modules


def spoil_config(directory):
    """Another rotary base: every tensor is right, the model is not."""
    file = directory / "config.json"
    values = json.loads(file.read_text())
    values["rope_parameters"]["rope_theta"] = 3.0
    file.write_text(json.dumps(values))


def spoil_weights(directory):
    """The values of one matrix negated, after they were read back."""
    file = directory / "model.safetensors"
    weight = load_file(file)["layers.1.self_attn.o_proj.weight"]
    data, old = bytearray(file.read_bytes()), bytes(weight.numpy())
    offset = data.index(old)
    data[offset:offset + len(old)] = bytes((-weight).numpy())
    file.write_bytes(data)


def spoil_names(directory):
    """A tensor of the backbone under a name that the stock library does not know: it would start from chance."""
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes().replace(b"layers.1.mlp.up_proj.weight", b"layers.1.mlp.xx_proj.weight"))


def spoil_tokenizer(directory):
    (directory / "tokenizer.json").write_text("{")


def spoil_pooling(directory):
    file = directory / "1_Pooling" / "config.json"
    file.write_text(file.read_text().replace('"pooling_mode_lasttoken": true', '"pooling_mode_lasttoken": false')
                    .replace('"pooling_mode_mean_tokens": false', '"pooling_mode_mean_tokens": true'))


DAMAGES = {
    "configuration": (spoil_config, "hf", "Transformers' vector of text"),
    "weights": (spoil_weights, "hf", "Transformers' vector of text"),
    "names": (spoil_names, "hf", "layers.1.mlp.up_proj.weight"),
    "configuration, st": (spoil_config, "sentence-transformers", "Sentence Transformers' vector of text"),
    "weights, st": (spoil_weights, "sentence-transformers", "Sentence Transformers' vector of text"),
    "pooling, st": (spoil_pooling, "sentence-transformers", "Sentence Transformers' vector of text"),
    "tokenizer, st": (spoil_tokenizer, "sentence-transformers", "Sentence Transformers cannot use it"),
}


def convert_spoiled(arguments, spoil):
    """The command, with the finished directory damaged right before the comparison."""
    from megatron_embed.export import embedding as export
    from megatron_embed.export import formats as exporters

    with ExitStack() as patches:
        for module, name in ((exporters, "compare_with_transformers"), (export, "compare_with_sentence_transformers")):
            compare = vars(module)[name]

            def spoiled(directory, *args, compare=compare, **kwargs):
                spoil(directory)
                return compare(directory, *args, **kwargs)

            patches.enter_context(mock.patch.object(module, name, spoiled))
        return command(arguments)


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_export_is_refused_and_removed(name, checkpoints, tmp_path):
    spoil, output, words = DAMAGES[name]
    results = run_on_ranks(convert_spoiled, 1, convert(checkpoints / "qwen3", tmp_path / "out", "--format", output),
                           spoil)
    assert_refused(results, words, "the export must not be used")
    assert not list(tmp_path.iterdir())
