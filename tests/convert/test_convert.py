"""Hugging Face -> Megatron -> Hugging Face is bit-equal, and a failure leaves nothing behind."""

import json
import os
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from megatron_embed.convert.checkpoint_directory import is_checkpoint, open_checkpoint, write_sidecar_files
from megatron_embed.convert.convert import hf_to_megatron, megatron_to_hf
from megatron_embed.convert.storage import copying
from megatron_embed.convert.storage.safetensors_file import SafetensorsWriter
from megatron_embed.convert.storage.sharded import parse_size
from megatron_embed.convert.storage.torch_dist import DcpReader, DcpWriter
from megatron_embed.errors import CheckpointError
from tests.helpers.tensor_files import assert_bit_equal, edit_config, edit_tensors, tensors_of
from tests.helpers.toys import MINILM, save_toy

MODELS = {
    "bert": {"kind": "BertModel"},
    "bert without pooler, bfloat16": {"kind": "BertModel", "dtype": torch.bfloat16, "add_pooling_layer": False},
    "bert with heads and prefix": {"kind": "BertForPreTraining"},
    "bert, sharded": {"kind": "BertModel", "shard": "20KB"},
    "qwen3, no prefix": {"kind": "Qwen3Model"},
    "qwen3, tied": {"kind": "Qwen3ForCausalLM", "tie_word_embeddings": True},
    "qwen3, untied, bfloat16": {"kind": "Qwen3ForCausalLM", "tie_word_embeddings": False, "dtype": torch.bfloat16},
    "qwen3, untied, sharded": {"kind": "Qwen3ForCausalLM", "tie_word_embeddings": False, "shard": "30KB"},
    "qwen3, one key head": {"kind": "Qwen3Model", "num_key_value_heads": 1, "head_dim": 6},
    "qwen3, classifier": {"kind": "Qwen3ForSequenceClassification", "num_labels": 1},
    "qwen3_moe, no prefix": {"kind": "Qwen3MoeModel"},
    "qwen3_moe, untied, bfloat16, sharded": {"kind": "Qwen3MoeForCausalLM", "tie_word_embeddings": False,
                                             "dtype": torch.bfloat16, "shard": "30KB"},
    "roberta, no pooler, bare": {"kind": "RobertaModel", "add_pooling_layer": False},
    "xlm-roberta": {"kind": "XLMRobertaModel"},
    "xlm-roberta, tied head": {"kind": "XLMRobertaForMaskedLM"},
    "xlm-roberta, classifier, bfloat16, sharded": {"kind": "XLMRobertaForSequenceClassification",
                                                   "dtype": torch.bfloat16, "shard": "20KB"},
    "modernbert, no prefix": {"kind": "ModernBertModel"},
    "modernbert, tied head, sharded, bfloat16": {"kind": "ModernBertForMaskedLM", "dtype": torch.bfloat16,
                                                 "shard": "20KB"},
    "modernbert, classifier, biases": {"kind": "ModernBertForSequenceClassification", "num_labels": 1,
                                       "norm_bias": True, "classifier_bias": True},
    "qwen2, no prefix, sharded": {"kind": "Qwen2Model", "shard": "20KB"},
    "qwen2, tied": {"kind": "Qwen2ForCausalLM", "tie_word_embeddings": True},
    "qwen2, classifier": {"kind": "Qwen2ForSequenceClassification", "num_labels": 1},
    "llama, untied, bfloat16, sharded": {"kind": "LlamaForCausalLM", "dtype": torch.bfloat16, "shard": "30KB"},
    "llama, biases, no prefix": {"kind": "LlamaModel", "attention_bias": True, "mlp_bias": True},
    "llama, tokens classified": {"kind": "LlamaForTokenClassification"},
    "mistral, no prefix, bfloat16": {"kind": "MistralModel", "dtype": torch.bfloat16},
    "mistral, untied, head of another size": {"kind": "MistralForCausalLM", "head_dim": 10, "sliding_window": None},
    "mistral, classifier": {"kind": "MistralForSequenceClassification", "num_labels": 1},
    "gemma2, tied, bfloat16, sharded": {"kind": "Gemma2ForCausalLM", "dtype": torch.bfloat16, "shard": "30KB"},
    "gemma3_text, no prefix, one key head": {"kind": "Gemma3TextModel", "num_key_value_heads": 1},
    "gemma3_text, classifier": {"kind": "Gemma3TextForSequenceClassification", "num_labels": 1},
    "phi3, untied, bfloat16, sharded": {"kind": "Phi3ForCausalLM", "dtype": torch.bfloat16, "shard": "30KB"},
    "glm, no prefix, no biases": {"kind": "GlmModel", "attention_bias": False},
    "glm4, untied": {"kind": "Glm4ForCausalLM"},
    "nomic_bert": {"kind": "NomicBertModel"},
    "nomic_bert, classifier": {"kind": "NomicBertForSequenceClassification", "num_labels": 1},
    "mixtral, no prefix": {"kind": "MixtralModel"},
    "mixtral, untied, bfloat16, sharded": {"kind": "MixtralForCausalLM", "dtype": torch.bfloat16, "shard": "30KB"},
}


def save_model(path, kind, add_pooling_layer=True, **settings):
    save_toy(path, kind, **settings)
    if not add_pooling_layer:
        edit_tensors(path, lambda tensors: [tensors.pop(name) for name in list(tensors) if name.startswith("pooler")])
    return path


def round_trip(source, tmp_path, **settings):
    hf_to_megatron(source, tmp_path / "megatron")
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back", **settings)
    return tmp_path / "back"


@pytest.mark.parametrize("name", MODELS)
def test_round_trip_is_bit_equal_with_the_same_names(name, tmp_path):
    source = save_model(tmp_path / "source", **MODELS[name])
    back = round_trip(source, tmp_path)
    assert_bit_equal(tensors_of(back), tensors_of(source))
    assert json.loads((back / "config.json").read_text()) == json.loads((source / "config.json").read_text())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "megatron", "source"]


def test_real_weights_and_every_other_file(tmp_path):
    back = round_trip(MINILM, tmp_path)
    assert_bit_equal(tensors_of(back), tensors_of(MINILM))
    for file in MINILM.rglob("*"):
        if file.is_file() and file.name != "model.safetensors":
            assert (back / file.relative_to(MINILM)).read_bytes() == file.read_bytes()
    report = megatron_to_hf(tmp_path / "megatron", tmp_path / "again")
    assert str(report).startswith(f"{tmp_path / 'again'}: 104 tensors, 0.09 GB, float32, in ")


def test_checkpoint_layout_and_keys(tmp_path):
    save_toy(tmp_path / "source", "Qwen3ForCausalLM", tie_word_embeddings=False)
    (tmp_path / "source" / "tokenizer.json").write_text("{}")
    (tmp_path / "source" / "pytorch_model.bin").write_bytes(b"weights again")
    hf_to_megatron(tmp_path / "source", tmp_path / "megatron")
    assert json.loads((tmp_path / "megatron" / "megatron_embed.json").read_text()) == {
        "family": "qwen3", "dtype": "float32", "source_architectures": ["Qwen3ForCausalLM"], "prefixed": True,
        "tied_copies": {}, "max_lengths": {}, "format": 1}
    files = {path.name for path in (tmp_path / "megatron" / "hf").iterdir()}
    assert files == {"config.json", "generation_config.json", "tokenizer.json", "carried.safetensors"}
    with safe_open(tmp_path / "megatron" / "hf" / "carried.safetensors", "pt") as passthrough:
        assert list(passthrough.keys()) == ["lm_head.weight"]
    with DcpReader(tmp_path / "megatron" / "model") as reader:
        keys = set(reader.keys())
        assert reader.shape("model.embedding.word_embeddings.weight") == (103, 24)
    assert {key for key in keys if ".layers." not in key} == {
        "model.embedding.word_embeddings.weight", "model.decoder.final_layernorm.weight"}
    assert {key.removeprefix("model.decoder.layers.2.") for key in keys if ".layers.2." in key} == {
        "self_attention.linear_qkv.layer_norm_weight", "self_attention.linear_qkv.weight",
        "self_attention.q_layernorm.weight", "self_attention.k_layernorm.weight", "self_attention.linear_proj.weight",
        "mlp.linear_fc1.layer_norm_weight", "mlp.linear_fc1.weight", "mlp.linear_fc2.weight"}


def test_shards_have_an_index_and_transformers_loads_them(tmp_path):
    import transformers

    source = save_toy(tmp_path / "source", "Qwen3Model")
    back = round_trip(source, tmp_path, max_shard_size="20KB")
    index = json.loads((back / "model.safetensors.index.json").read_text())
    shards = sorted(back.glob("model-*.safetensors"))
    assert len(shards) > 2
    assert shards[0].name == f"model-00001-of-{len(shards):05d}.safetensors"
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors_of(source).values())
    assert set(index["weight_map"]) == set(tensors_of(source))
    assert_bit_equal(tensors_of(back), tensors_of(source))
    assert_bit_equal(transformers.AutoModel.from_pretrained(back).state_dict(), tensors_of(source))


def test_a_stored_tied_head_follows_the_embedding(tmp_path):
    source = save_toy(tmp_path / "source", "Qwen3ForCausalLM", tie_word_embeddings=True)
    edit_tensors(source, lambda tensors: tensors.update({
        "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}))
    hf_to_megatron(source, tmp_path / "megatron")
    info = open_checkpoint(tmp_path / "megatron").info
    assert info.tied_copies == {"lm_head.weight": "model.embed_tokens.weight"}
    assert not (tmp_path / "megatron" / "hf" / "carried.safetensors").exists()
    trained = rewrite_model(tmp_path / "megatron", tmp_path / "trained", lambda tensor: tensor + 1)
    megatron_to_hf(trained, tmp_path / "back")
    tensors = tensors_of(tmp_path / "back")
    assert torch.equal(tensors["lm_head.weight"], tensors_of(source)["lm_head.weight"] + 1)
    assert torch.equal(tensors["lm_head.weight"], tensors["model.embed_tokens.weight"])


def test_old_names_of_norms_are_read_and_written_as_transformers_does(tmp_path):
    source = save_toy(tmp_path / "source", "BertModel")
    expected = tensors_of(source)
    old = {name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
           for name, tensor in expected.items()}
    assert old.keys() != expected.keys()
    save_file(old, source / "model.safetensors", {"format": "pt"})
    assert_bit_equal(tensors_of(round_trip(source, tmp_path)), expected)


def test_rotary_frequencies_in_files_of_llama_2_pass_through(tmp_path):
    source = save_toy(tmp_path / "source", "LlamaForCausalLM")
    edit_tensors(source, lambda tensors: tensors.update({
        f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": torch.rand(3) for layer in range(3)}))
    assert_bit_equal(tensors_of(round_trip(source, tmp_path)), tensors_of(source))


def rewrite_model(megatron, destination, change, *, pad_to=None, extra=()):
    """A training checkpoint: sidecar files, changed weights, a padded vocabulary and other keys."""
    destination.mkdir()
    with DcpReader(megatron / "model") as reader:
        dtype = None
        (destination / "model").mkdir()
        with DcpWriter(destination / "model") as writer:
            for key in reader.keys():  # noqa: SIM118  not a dictionary
                tensor = change(reader.read(key))
                dtype = str(tensor.dtype).removeprefix("torch.")
                if pad_to and "word_embeddings" in key:
                    tensor = torch.cat([tensor, tensor.new_full((pad_to - len(tensor), tensor.shape[1]), 9.0)])
                writer.add(key, tensor)
            for key in extra:
                writer.add(key, torch.zeros(3))
    write_sidecar_files(megatron, destination, dtype=dtype)
    return destination


def test_training_checkpoint_by_run_directory_or_step(tmp_path):
    source = save_toy(tmp_path / "source", "BertForMaskedLM")
    hf_to_megatron(source, tmp_path / "megatron")
    run = tmp_path / "run"
    run.mkdir()
    rewrite_model(tmp_path / "megatron", run / "step_000010", lambda tensor: tensor, pad_to=128,
                  extra=["optimizer.state.exp_avg.model.x"])
    rewrite_model(tmp_path / "megatron", run / "step_000020", lambda tensor: tensor.bfloat16(), pad_to=104)
    (run / "latest").write_text("step_000020\n")
    megatron_to_hf(run / "step_000010", tmp_path / "first")
    assert_bit_equal(tensors_of(tmp_path / "first"), tensors_of(source))
    megatron_to_hf(run, tmp_path / "second")
    assert is_checkpoint(run)
    (run / "step_000020" / "megatron_embed.json").rename(tmp_path / "half a checkpoint")
    assert open_checkpoint(run).path == run / "step_000010"
    (run / "step_000010" / "megatron_embed.json").unlink()
    assert not is_checkpoint(run)
    with pytest.raises(CheckpointError, match="no megatron_embed.json, so this is not a checkpoint"):
        open_checkpoint(run)
    assert json.loads((tmp_path / "second" / "config.json").read_text())["dtype"] == "bfloat16"
    second = tensors_of(tmp_path / "second")
    head = {name for name in second if name.startswith("cls.")}
    assert head
    assert_bit_equal(second, {name: tensor if name in head else tensor.bfloat16()
                              for name, tensor in tensors_of(source).items()})


def test_a_config_without_dtype_gets_one_only_when_it_is_not_float32(tmp_path):
    hf_to_megatron(MINILM, tmp_path / "megatron")
    rewrite_model(tmp_path / "megatron", tmp_path / "trained", lambda tensor: tensor.bfloat16())
    megatron_to_hf(tmp_path / "trained", tmp_path / "back")
    assert json.loads((tmp_path / "back" / "config.json").read_text())["dtype"] == "bfloat16"


def test_sidecar_files_of_a_hugging_face_directory(tmp_path):
    (tmp_path / "step").mkdir()
    info = write_sidecar_files(save_toy(tmp_path / "source", "BertModel"), tmp_path / "step", dtype="bfloat16")
    assert (info.family, info.dtype, info.prefixed) == ("bert", "bfloat16", False)
    assert (tmp_path / "step" / "hf" / "carried.safetensors").is_file()


@pytest.mark.parametrize("prepare, match", [
    (lambda path: (path / "x").touch(), "exists and is not empty; name a new directory"),
    (lambda path: (path.rmdir(), path.write_text("")), "exists and is not empty"),
    (lambda path: (path.rmdir(), path.symlink_to("nothing")), "is a link; name a new directory"),
    (lambda path: (path.rename(path.parent / "other"), path.symlink_to("other")), "is a link; name a new directory"),
])
def test_destination_in_use_is_refused(prepare, match, tmp_path):
    source = save_toy(tmp_path / "source", "BertModel")
    (tmp_path / "out").mkdir()
    prepare(tmp_path / "out")
    with pytest.raises(CheckpointError, match=match):
        hf_to_megatron(source, tmp_path / "out")


def test_unwritable_or_unwise_destinations_are_refused(tmp_path):
    source = save_toy(tmp_path / "source", "BertModel")
    (tmp_path / "file").touch()
    for destination in ("/proc/out", tmp_path / "file" / "out"):
        with pytest.raises(CheckpointError, match=r"cannot be written .*; name a directory that can"):
            hf_to_megatron(source, destination)
    with pytest.raises(CheckpointError, match="lies inside the source"):
        hf_to_megatron(source, source / "out")
    (tmp_path / "empty").mkdir()
    hf_to_megatron(source, tmp_path / "empty")
    assert open_checkpoint(tmp_path / "empty").info.family == "bert"


def test_full_disk_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    source = save_toy(tmp_path / "source", "BertModel")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("megatron_embed.convert.checkpoint_directory.shutil.disk_usage",
                        lambda path: usage._replace(free=1000))
    with pytest.raises(CheckpointError, match=r"0.00 GB free, 0.07 GB needed; free some space"):
        hf_to_megatron(source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("error, caught", [
    (OSError(28, "No space left on device"), CheckpointError), (KeyboardInterrupt(), KeyboardInterrupt)])
def test_a_failure_in_the_middle_leaves_nothing(error, caught, tmp_path, monkeypatch):
    source = save_toy(tmp_path / "source", "BertModel")
    plain_reserve, calls = DcpWriter.reserve, []

    def failing_reserve(self, key, *tensor, **experts):
        calls.append(key)
        if len(calls) == 10:
            assert {path.name for path in tmp_path.iterdir()} == {"source", f".out.writing-{os.getpid()}"}
            raise error
        return plain_reserve(self, key, *tensor, **experts)

    monkeypatch.setattr(DcpWriter, "reserve", failing_reserve)
    with pytest.raises(caught):
        hf_to_megatron(source, tmp_path / "out")
    assert len(calls) == 10
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_failing_finish_leaves_nothing(tmp_path):
    hf_to_megatron(save_toy(tmp_path / "source", "BertModel"), tmp_path / "megatron")
    seen = []

    def finish(directory):
        seen.append(sorted(path.name for path in directory.iterdir()))
        raise CheckpointError("the export is another model")

    with pytest.raises(CheckpointError, match="another model"):
        megatron_to_hf(tmp_path / "megatron", tmp_path / "out", finish=finish)
    assert seen == [["config.json", "model.safetensors"]]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["megatron", "source"]


@pytest.mark.parametrize("direction", ["to megatron", "to hf"])
def test_what_reads_back_differently_is_refused(direction, tmp_path, monkeypatch):
    source = save_toy(tmp_path / "source", "Qwen3Model")
    hf_to_megatron(source, tmp_path / "megatron")
    before = sorted(path.name for path in tmp_path.iterdir())

    verify = copying._verify

    def damaged(copy, *args):
        """One bit flips between writing a tensor and reading it back."""
        if copy.name.endswith(("layers.1.mlp.down_proj.weight", "layers.1.mlp.linear_fc2.weight")):
            file, offset = copy.target[0].file, copy.target[0].start + 50
            os.pwrite(file.fileno(), bytes([os.pread(file.fileno(), 1, offset)[0] ^ 16]), offset)
        verify(copy, *args)

    monkeypatch.setattr(copying, "_verify", damaged)
    if direction == "to megatron":
        with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.down_proj\.weight reads back differently"):
            hf_to_megatron(source, tmp_path / "out")
    else:
        with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.linear_fc2\.weight reads back differently"):
            megatron_to_hf(tmp_path / "megatron", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == before


@pytest.mark.parametrize("direction", ["to megatron", "to hf"])
def test_a_description_that_points_elsewhere_is_refused(direction, tmp_path, monkeypatch):
    """The bytes are right, but a reader would find each of two tensors at the other's range."""
    source = save_toy(tmp_path / "source", "Qwen3Model")
    hf_to_megatron(source, tmp_path / "megatron")
    before = sorted(path.name for path in tmp_path.iterdir())
    if direction == "to megatron":
        close = DcpWriter.close

        def swapped(self):
            first, second = (self._tensors[f"model.decoder.layers.{layer}.mlp.linear_fc2.weight"].chunks for layer in
                             range(2))
            first[:], second[:] = second[:], first[:]
            close(self)

        monkeypatch.setattr(DcpWriter, "close", swapped)
        with pytest.raises(CheckpointError, match=r"layers\.0\.mlp\.linear_fc2\.weight reads back differently"):
            hf_to_megatron(source, tmp_path / "out")
    else:
        reserve = SafetensorsWriter.reserve

        def swapped(self, name):
            layers = {"layers.0.mlp.down_proj.weight": "1", "layers.1.mlp.down_proj.weight": "0"}
            return reserve(self, name if name not in layers else f"layers.{layers[name]}.mlp.down_proj.weight")

        monkeypatch.setattr(SafetensorsWriter, "reserve", swapped)
        with pytest.raises(CheckpointError, match=r"layers\.\d\.mlp\.down_proj\.weight reads back differently"):
            megatron_to_hf(tmp_path / "megatron", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_parts_of_one_parameter_that_differ_in_dtype_are_refused(tmp_path):
    source = save_toy(tmp_path / "source", "Qwen3Model")
    edit_tensors(source, lambda tensors: tensors.update({
        "layers.1.self_attn.k_proj.weight": tensors["layers.1.self_attn.k_proj.weight"].bfloat16()}))
    with pytest.raises(CheckpointError, match=r"q_proj.weight is torch.float32 and .*k_proj.weight torch.bfloat16"):
        hf_to_megatron(source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("change, match", [
    (lambda path: (path / "megatron_embed.json").unlink(), "no megatron_embed.json, so this is not a checkpoint"),
    (lambda path: (path / "megatron_embed.json").write_text('{"format": 2}'), "format = 2, but this version reads 1"),
    (lambda path: (path / "megatron_embed.json").write_text("{"), "megatron_embed.json: not readable"),
    (lambda path: (path / "megatron_embed.json").write_text('{"format": 1, "famly": "bert"}'), "famly"),
    (lambda path: (path / "model" / ".metadata").unlink(), r"no \.metadata, so this is not a complete torch_dist"),
    (lambda path: (path / "model" / ".metadata").write_bytes(b"\x80\x04"), "not readable as torch_dist metadata"),
    (lambda path: os.truncate(path / "model" / "__0_0.distcp", 20_000), "truncated: .* take another checkpoint"),
    (lambda path: edit_config(path / "hf", num_hidden_layers=4), r"layers\.3\..* is missing; .*num_hidden_layers = 4"),
    (lambda path: edit_config(path / "hf", num_hidden_layers=2), r"layers\.2\..* is unknown to the weight table"),
    (lambda path: edit_config(path / "hf", vocab_size=102),
     r"word_embeddings.weight has shape \[101, 24\], but .*\[102, 24\]"),
    (lambda path: edit_config(path / "hf", intermediate_size=39), r"linear_fc1.weight has shape \[40, 24\]"),
])
def test_broken_checkpoints_are_refused(change, match, tmp_path):
    hf_to_megatron(save_toy(tmp_path / "source", "BertModel"), tmp_path / "megatron")
    change(tmp_path / "megatron")
    with pytest.raises(CheckpointError, match=match) as caught:
        megatron_to_hf(tmp_path / "megatron", tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["megatron", "source"]


def test_a_hugging_face_directory_needs_no_conversion_back(tmp_path):
    with pytest.raises(CheckpointError, match="it is a Hugging Face directory already"):
        megatron_to_hf(save_toy(tmp_path / "source", "BertModel"), tmp_path / "out")


@pytest.mark.parametrize("size", ["5", "12MB", "0.5 GiB"])
def test_sizes(size, tmp_path):
    assert parse_size(size) == {"5": 5, "12MB": 12_000_000, "0.5 GiB": 1 << 29}[size]


@pytest.mark.parametrize("size", ["five", "0GB", "-1GB", "5XB", ""])
def test_invalid_sizes_are_refused(size, tmp_path):
    with pytest.raises(CheckpointError, match="is not a size; write it like 5GB"):
        megatron_to_hf(tmp_path, tmp_path / "out", max_shard_size=size)
