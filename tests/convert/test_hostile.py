"""Untrusted model directories: names that lead outside, links, pipes and headers with false sizes."""

import json
import os
import shutil
from importlib.metadata import files
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megatron_embed.convert.checkpoint_directory import copy_files, open_checkpoint
from megatron_embed.convert.hf_directory import HFDirectory
from megatron_embed.convert.storage.safetensors_file import LONGEST_HEADER, SafetensorsFile
from megatron_embed.data.load_tokenizer import load_tokenizer
from megatron_embed.errors import CheckpointError
from megatron_embed.export.cross_encoder import export_cross_encoder
from megatron_embed.export.sentence_transformers import export_sentence_transformers, load_export_tokenizer
from megatron_embed.loading.model_directory import find_model
from megatron_embed.models.file_checks import check_files, open_regular, plain_name
from megatron_embed.models.modules_json import STOCK_TYPES, read_modules
from megatron_embed.models.reranker_settings import RerankerSettings
from megatron_embed.models.saved_settings import read_saved_settings
from tests.helpers.ranks import run_on_ranks
from tests.helpers.refusals import assert_refused, command
from tests.helpers.toys import save_model

ELSEWHERE = ("/", "..", ".", "", "../victim", "1_Pooling/../../victim", "./1_Pooling", "a/b", "1_Pooling/",
             "..\\victim", "a\0b", "a\nb", "a" * 256)
TRANSFORMER = {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"}


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return Path(save_model(tmp_path_factory.mktemp("toys") / "bert", "bert", tokenizer=True, num_hidden_layers=1))


@pytest.fixture
def model(toy, tmp_path):
    """A copy of the toy model, beside a folder that must stay untouched."""
    (tmp_path / "victim").mkdir()
    (tmp_path / "victim" / "kept").write_text("mine")
    (tmp_path / "victim" / "config.json").write_text('{"pooling_mode_cls_token": true}')
    return shutil.copytree(toy, tmp_path / "model")


def write_modules(model, *modules):
    (model / "modules.json").write_text(json.dumps([TRANSFORMER, *modules]))


def pooling(path, kind="sentence_transformers.models.Pooling"):
    return {"idx": 1, "name": "1", "path": path, "type": kind}


def files_below(folder):
    return sorted(str(path) for path in folder.rglob("*"))


@pytest.mark.parametrize("configuration", [None, b"model: \xde"])
def test_prompts_that_cannot_be_read_are_not_exported(toy, tmp_path, configuration):
    """They are copied, and nothing but the card reads them; a run's configuration may be damaged too."""
    from megatron_embed.convert.convert import hf_to_megatron

    hf_to_megatron(toy, tmp_path / "checkpoint")
    file = tmp_path / "checkpoint" / "hf" / "config_sentence_transformers.json"
    file.write_bytes(b'{"prompts"\xde: {}}')
    if configuration is not None:
        (tmp_path / "checkpoint" / "config.yaml").write_bytes(configuration)
    arguments = ["convert", "megatron-to-hf", str(tmp_path / "checkpoint"), str(tmp_path / "made")]
    assert_refused(run_on_ranks(command, 1, arguments), "config_sentence_transformers.json: not readable as JSON")
    assert not (tmp_path / "made").exists()
    file.write_text('{"prompts": {"query": "q: "}}')
    assert run_on_ranks(command, 1, arguments)[0][0] == 0
    assert "- query: `'q: '`" in (tmp_path / "made" / "README.md").read_text()


@pytest.mark.parametrize("name", [*ELSEWHERE, None, 1, ["a"]])
def test_a_name_is_one_plain_name(name):
    with pytest.raises(CheckpointError, match=r"x\.json: path = .*: must be the plain name of one file or folder"):
        plain_name(name, "x.json: path")


@pytest.mark.parametrize("name", ["1_Pooling", "model-00001-of-00002.safetensors", "..a", "a..", "ü b", "__0_0.distcp"])
def test_plain_names_are_taken(name):
    assert plain_name(name, "x") == name


@pytest.mark.parametrize("name", ["{victim}", "1_Pooling/../../victim", "../victim", ".", ""])
def test_no_reader_follows_a_module_elsewhere(model, tmp_path, name):
    """No writer removes the named folder either."""
    before = files_below(tmp_path / "victim")
    write_modules(model, pooling(name.format(victim=tmp_path / "victim")))
    for read in (read_saved_settings, lambda folder: copy_files(folder, tmp_path / "copy")):
        with pytest.raises(CheckpointError, match=r"modules.json: path of module 1 .*: must be the plain name"):
            read(model)
    export_sentence_transformers(model, pooling="mean", normalize=True, query_prompt="", document_prompt="",
                                 max_seq_length=8, embedding_dimension=32)
    assert read_saved_settings(model).pooling == "mean"
    write_modules(model, pooling(name.format(victim=tmp_path / "victim")))
    settings = RerankerSettings(head="score", template=None, instruction="", true_token="yes", false_token="no",
                                max_length=8, activation="sigmoid")
    export_cross_encoder(model, settings, family="bert", encoder=True, classification=True, pieces=None,
                         token_ids=None)
    assert files_below(tmp_path / "victim") == before
    assert (model / "model.safetensors").is_file()


def test_commands_refuse_and_touch_nothing(model, tmp_path):
    (tmp_path / "texts.jsonl").write_text('{"text": "one"}\n')
    (tmp_path / "train.jsonl").write_text('{"query": "a", "positive": ["b"]}\n' * 4)
    write_modules(model, pooling(str(tmp_path / "victim")))
    before = files_below(tmp_path)
    for arguments in (["convert", "hf-to-megatron", str(model), str(tmp_path / "out")],
                      ["encode", "--model", str(model), "--input", str(tmp_path / "texts.jsonl"), "--output",
                       str(tmp_path / "v.npy")],
                      ["train", f"model.path={model}", f"data.train=[{tmp_path}/train.jsonl]",
                       "training.train_steps=1", "training.global_batch_size=2",
                       f"checkpoint.directory={tmp_path}/run"]):
        ((code, _, err, _),) = run_on_ranks(command, 1, arguments)
        assert (code, "Traceback" in err) == (2, False), err
        assert files_below(tmp_path) == before


def test_the_transformers_own_place_is_the_directory(model):
    write_modules(model)
    assert [(module.kind, module.path) for module in read_modules(model / "modules.json")] == [("Transformer", "")]


@pytest.mark.parametrize("kind", ["evil.Pooling", "Pooling", "sentence_transformers.models.Pooling.evil",
                                  "sentence_transformers.evil.Pooling", "sentence_transformers.models.LSTM"])
def test_a_class_of_the_same_last_name_is_another_one(model, kind):
    (model / "1_Pooling").mkdir()
    (model / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
    write_modules(model, pooling("1_Pooling"))
    assert read_saved_settings(model).pooling == "mean"
    write_modules(model, pooling("1_Pooling", kind))
    with pytest.raises(CheckpointError, match=f"module '{kind}' is not supported"):
        read_saved_settings(model)


def test_what_sentence_transformers_writes_is_known():
    """Without its import, which takes long: the classes of the installed version are where our table has them."""
    installed = {str(file): file for file in files("sentence-transformers")}
    known = set()
    for name, kind in STOCK_TYPES.items():
        path = name.rpartition(".")[0].replace(".", "/") + ".py"
        if path in installed and f"class {kind}(" in installed[path].read_text():
            known.add(kind)
    assert known == {"Transformer", "Pooling", "Dense", "Normalize", "Dropout", "LogitScore", "MultiVectorMask",
                     "SpladePooling"}


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "1_Pooling"])
@pytest.mark.parametrize("target", ["{victim}/kept", "../victim/kept", "/dev/zero", "{victim}"])
def test_links_that_lead_elsewhere_are_refused(model, tmp_path, target, name):
    link = model / name
    link.unlink(missing_ok=True)
    link.symlink_to(target.format(victim=tmp_path / "victim"))
    for opened in (HFDirectory, check_files):
        with pytest.raises(CheckpointError, match=f"{link}: is a link to (a device|.*, outside of the directory)"):
            opened(model)


def test_links_within_the_directory_are_read(model):
    (model / "model.safetensors").rename(model / "weights")
    (model / "model.safetensors").symlink_to("weights")
    (model / "absent.txt").symlink_to("nothing")
    with HFDirectory(model) as opened:
        assert opened.stored_names
    (model / "absent.json").symlink_to("nothing")
    with pytest.raises(CheckpointError, match=r"absent.json: is a link to a file that is not there \(nothing\)"):
        check_files(model)


def test_the_hubs_cache_is_read(toy, tmp_path):
    """snapshots/REVISION/FILE -> ../../blobs/HASH, also through a link to the whole cache."""
    cache = tmp_path / "models--a--b"
    snapshot = cache / "snapshots" / "0123"
    (snapshot / "1_Pooling").mkdir(parents=True)
    (cache / "blobs").mkdir()
    for index, file in enumerate(sorted(toy.iterdir())):
        shutil.copy(file, cache / "blobs" / str(index))
        (snapshot / file.name).symlink_to(f"../../blobs/{index}")
    (cache / "blobs" / "pooling").write_text('{"pooling_mode_cls_token": true}')
    (snapshot / "1_Pooling" / "config.json").symlink_to("../../../blobs/pooling")
    write_modules(snapshot, pooling("1_Pooling"))
    (tmp_path / "linked").symlink_to(cache)
    (tmp_path / "model").symlink_to(snapshot)
    for directory in (snapshot, tmp_path / "linked" / "snapshots" / "0123", tmp_path / "model"):
        with HFDirectory(directory) as opened:
            assert opened.stored_names
        assert read_saved_settings(directory).pooling == "cls"
    (tmp_path / "secret").write_text("{}")
    (snapshot / "extra.json").symlink_to("../../../secret")
    with pytest.raises(CheckpointError, match=r"extra.json: is a link to .*secret, outside of the directory"):
        check_files(snapshot)
    (snapshot / "extra.json").unlink()
    (cache / "blobs").rename(tmp_path / "elsewhere")
    (cache / "blobs").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="is a link to .*elsewhere/.*, outside of the directory"):
        check_files(snapshot)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors", "vocab.txt", "extra"])
def test_pipes_are_not_waited_for(model, name, tmp_path):
    (model / name).unlink(missing_ok=True)
    os.mkfifo(model / name)
    for read in (HFDirectory, check_files, lambda _: open_regular(model / name)):
        with pytest.raises(CheckpointError, match=f"{model / name}: is a pipe, which is not read"):
            read(model)
    with pytest.raises(CheckpointError, match="/dev/zero: is a device, which is not read"):
        open_regular(Path("/dev/zero"))


def test_a_checkpoints_files_are_looked_through(tmp_path):
    (tmp_path / "hf").mkdir()
    (tmp_path / "megatron_embed.json").write_text("{}")
    (tmp_path / "hf" / "tokenizer.json").symlink_to("/dev/zero")
    with pytest.raises(CheckpointError, match=r"hf/tokenizer.json: is a link to a device"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("key", ["tokenizer_file", "vocab_file", "fast_tokenizer_files"])
def test_no_tokenizer_from_elsewhere(model, tmp_path, key):
    config = json.loads((model / "tokenizer_config.json").read_text())
    for name, is_there in ((str(tmp_path / "victim" / "kept"), True), ("../victim/kept", True),
                           ("/elsewhere/tokenizer.json", False)):
        (model / "tokenizer_config.json").write_text(json.dumps(
            config | {key: [name] if key.endswith("s") else name, "special_tokens_map_file": name}))
        if is_there:
            with pytest.raises(CheckpointError, match=f"tokenizer_config.json: {key} = .*: must be the plain name"):
                load_export_tokenizer(model)
        elif key == "fast_tokenizer_files":
            load_export_tokenizer(model)


@pytest.mark.parametrize("key", ["vocab", "merges", "gguf_file"])
@pytest.mark.parametrize("name", ["{victim}/kept", "kept"])
def test_no_file_of_any_place_in_place_of_a_vocabulary(model, tmp_path, monkeypatch, key, name):
    """Without tokenizer.json Transformers opens `vocab`; a plain name is one in the current directory."""
    monkeypatch.chdir(tmp_path / "victim")
    edit(model / "tokenizer_config.json", **{key: name.format(victim=tmp_path / "victim")})
    (model / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=rf"tokenizer_config.json: {key} = .*Transformers would open that file"):
        find_model(str(model))


def test_no_tokenizer_from_elsewhere_beside_an_adapter(model, tmp_path):
    qwen = save_model(tmp_path / "qwen3", "qwen3", tokenizer=True, num_hidden_layers=1)
    adapter = shutil.copytree(model, tmp_path / "adapter", ignore=shutil.ignore_patterns("config.json", "model*"))
    (adapter / "adapter_config.json").write_text(json.dumps({
        "peft_type": "LORA", "r": 2, "lora_alpha": 4, "base_model_name_or_path": qwen, "target_modules": ["q_proj"]}))
    prefix = "base_model.model.layers.0.self_attn.q_proj.lora_"
    save_file({f"{prefix}A.weight": torch.ones(2, 32), f"{prefix}B.weight": torch.ones(64, 2)},
              adapter / "adapter_model.safetensors")
    assert find_model(str(adapter)).tokenizer_directory == adapter
    edit(adapter / "tokenizer_config.json", vocab_file=str(tmp_path / "victim" / "kept"))
    with pytest.raises(CheckpointError, match=r"adapter/tokenizer_config.json: vocab_file = .*: must be the plain"):
        find_model(str(adapter))


def test_chat_templates_with_names_have_a_limit(model):
    folder = model / "additional_chat_templates"
    folder.mkdir()
    (folder / "rag.jinja").write_text("{{ messages[0].content }}")
    load_tokenizer(str(model), None)
    os.truncate(folder / "rag.jinja", (16 << 20) + 1)
    with pytest.raises(CheckpointError, match=r"additional_chat_templates/rag.jinja: longer than 16 MiB"):
        load_tokenizer(str(model), None)


def test_long_keys_and_names_are_cut_in_messages(model):
    write_modules(model, pooling("1_Pooling", "x" * 10**6))
    with pytest.raises(CheckpointError, match=r"module 'x+\.\.\. is not supported") as error:
        read_saved_settings(model)
    assert len(str(error.value)) < 1000
    write_modules(model)
    (model / "sentence_bert_config.json").write_text(json.dumps({"k" * 10**6: 1}))
    with pytest.raises(CheckpointError, match=r"'k+\.\.\. = 1: a key that this version does not know") as error:
        read_saved_settings(model)
    assert len(str(error.value)) < 1000


def edit(file, **values):
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def header(path, *, length=None, **changes):
    """Write a file of one float32 tensor [2, 3] whose header has the given changes."""
    entry = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24], **changes}
    text = json.dumps({"a": entry}).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + b"\0" * 24)
    return path


@pytest.mark.parametrize("changes, match", [
    ({"shape": [-2, -3]}, r"a: shape = \[-2, -3\] must be a list of whole numbers"),
    ({"shape": [2.0, 3]}, r"a: shape = \[2.0, 3\] must be"), ({"shape": [True, 6]}, r"a: shape = \[True, 6\] must be"),
    ({"shape": "23"}, "a: shape = '23' must be"), ({"shape": {"2": 3}}, "must be"), ({"shape": [[6]]}, "must be"),
    ({"shape": [10**30]}, "must be a list"), ({"shape": [2**62, 2**62]}, "bytes 0 to 24 cannot hold shape"),
    ({"data_offsets": [0, 24.0]}, "data_offsets = .* must be"), ({"data_offsets": [-24, 0]}, "data_offsets"),
    ({"data_offsets": [False, 24]}, "data_offsets"), ({"data_offsets": [0]}, "header is not readable"),
    ({"data_offsets": [24, 48]}, "begins at byte"), ({"dtype": ["F32"]}, "dtype .* is not supported"),
    ({"dtype": None}, "dtype None is not supported"), ({"length": 2**63}, "no readable header"),
    ({"shape": ["9" * 1000]}, r"shape = .{80}\.\.\. must be"),
])
def test_headers_that_lie(changes, match, tmp_path):
    with pytest.raises(CheckpointError, match=match):
        SafetensorsFile(header(tmp_path / "x.safetensors", **changes))


def test_a_header_that_fills_a_sparse_file_takes_no_memory(tmp_path):
    file = header(tmp_path / "x.safetensors", length=LONGEST_HEADER + 1)
    os.truncate(file, 1 << 40)
    with pytest.raises(CheckpointError, match=f"a header of {LONGEST_HEADER + 1} bytes"):
        SafetensorsFile(file)
    text = b"[" * 100_000
    file.write_bytes(len(text).to_bytes(8, "little") + text)
    with pytest.raises(CheckpointError, match="header is not readable"):
        SafetensorsFile(file)


def test_a_header_of_many_numbers_is_refused_before_they_are_lists(tmp_path):
    text = b'{"a":{"dtype":"F32","data_offsets":[0,0],"shape":[' + b"1e1," * 4_000_001 + b"1]}}"
    (tmp_path / "a.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    with pytest.raises(CheckpointError, match="header is not readable .more than 4,000,000 values"):
        SafetensorsFile(tmp_path / "a.safetensors")


def test_tensors_that_share_bytes_are_refused(tmp_path):
    file = tmp_path / "x.safetensors"
    save_file({"a": torch.zeros(2), "b": torch.zeros(2)}, file)
    file.write_bytes(file.read_bytes().replace(b"[8,16]", b"[4,12]"))
    with pytest.raises(CheckpointError, match="b begins at byte"):
        SafetensorsFile(file)


def test_an_adapter_that_names_itself_ends(model, tmp_path):
    (tmp_path / "texts.jsonl").write_text('{"text": "one"}\n')
    (model / "adapter_config.json").write_text(json.dumps({
        "peft_type": "LORA", "r": 2, "lora_alpha": 4, "base_model_name_or_path": str(model)}))
    ((code, _, err, _),) = run_on_ranks(command, 1, [
        "encode", "--model", str(model), "--input", str(tmp_path / "texts.jsonl"), "--output", str(tmp_path / "v.npy")])
    assert (code, "Traceback" in err) == (2, False), err
    assert "has adapters itself; merge them first" in err
