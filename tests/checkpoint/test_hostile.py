"""Checkpoints of strangers run no code and lead nowhere; pruning and our own files do not follow links."""

import io
import json
import logging
import os
import pickle
import shutil
import stat
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.distributed.checkpoint.api import CheckpointException

from megatron_embed.checkpoint import files
from megatron_embed.checkpoint.file_checksums import CHECKSUM_FILE, changed_files
from megatron_embed.checkpoint.files import (
    MARK_FILE,
    latest_checkpoint,
    make_marked,
    remove_old,
    remove_unfinished,
    replace_directory,
    step_directories,
    write_atomically,
)
from megatron_embed.checkpoint.lock import _acquire
from megatron_embed.checkpoint.safe_unpickler import check_description, install
from megatron_embed.convert.convert import hf_to_megatron
from megatron_embed.convert.storage.torch_dist import DcpReader, DcpWriter
from megatron_embed.errors import CheckpointError, ConfigError
from megatron_embed.models.key_table import shown_value
from megatron_embed.platform import private_folder
from megatron_embed.platform.status import STATUS_FILE_VARIABLE, write_status
from tests.helpers.ranks import run_on_ranks
from tests.helpers.refusals import command
from tests.helpers.toys import save_model


class Trap:
    """Its pickle makes a folder when it is opened without care."""

    def __init__(self, path: Path) -> None:
        self.place = str(path)

    def __reduce__(self):
        return os.mkdir, (self.place,)


@pytest.fixture
def folder(tmp_path):
    """A torch_dist checkpoint of one tensor."""
    (tmp_path / "model").mkdir()
    with DcpWriter(tmp_path / "model") as writer:
        writer.add("a", torch.arange(6.0).reshape(2, 3))
    return tmp_path / "model"


def change_metadata(folder, change):
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    changed = change(metadata)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata if changed is None else changed))


def place_elsewhere(metadata, name):
    for info in metadata.storage_data.values():
        info.relative_path = name


CODE = {
    "whole": lambda metadata, trap: trap,
    "planner": lambda metadata, trap: setattr(metadata, "planner_data", {"a": trap}),
    "tensors": lambda metadata, trap: metadata.state_dict_metadata.update(b=trap),
    "places": lambda metadata, trap: metadata.storage_data.update({"b": trap}),
    "path": lambda metadata, trap: place_elsewhere(metadata, trap),
}


@pytest.mark.parametrize("kind", CODE)
def test_metadata_that_names_code_is_refused_by_every_reader(folder, tmp_path, kind):
    from torch.distributed.checkpoint import FileSystemReader

    install()
    check_description(folder)
    change_metadata(folder, lambda metadata: CODE[kind](metadata, Trap(tmp_path / "trap")))
    words = r"it names posix\.mkdir, and code that a checkpoint names is never run"
    for read in (check_description, DcpReader):
        with pytest.raises(CheckpointError, match=rf"\.metadata: .*{words}"):
            read(folder)
    with pytest.raises(pickle.UnpicklingError, match=words):  # what Megatron's load calls
        FileSystemReader(folder).read_metadata()
    assert not (tmp_path / "trap").exists()
    pickle.loads((folder / ".metadata").read_bytes())
    assert (tmp_path / "trap").exists()


_ROOM = r"asks for room for [\d,]+ objects or bytes"
BOMBS = {
    "number": (b"Nr" + (1 << 28).to_bytes(4, "little"), _ROOM), "number in text": (b"Np+0268435456\n", _ROOM),
    "frame": (b"\x95" + (1 << 36).to_bytes(8, "little"), _ROOM),
    "bytes": (b"\x8e" + (1 << 40).to_bytes(8, "little"), r"expected 1099511627776 bytes in a bytes8, but only \d+"),
    "bytearray": (b"\x96" + (1 << 36).to_bytes(8, "little"), r"expected 68719476736 bytes in a bytearray8, but only "),
}


@pytest.mark.parametrize("kind", BOMBS)
def test_metadata_that_asks_for_much_memory_is_refused_before_it_is_read(folder, kind):
    """One number, under which an object is to be kept, makes Python reserve room for all numbers below."""
    description = (folder / ".metadata").read_bytes()
    bomb, words = BOMBS[kind]
    (folder / ".metadata").write_bytes(description[:2] + bomb + b"0" + description[2:])
    for read in (check_description, DcpReader):
        with pytest.raises(CheckpointError, match=r"\.metadata: .*" + words):
            read(folder)


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_metadata_of_every_protocol_is_read(folder, protocol):
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    metadata.planner_data = {"a": ["x" * 300, 1.5, None, True, 10**30, -7]}
    (folder / ".metadata").write_bytes(pickle.dumps(metadata, protocol))
    check_description(folder)
    with DcpReader(folder) as reader:
        assert reader.keys() == ("a",)


def test_what_stands_in_place_of_a_name_is_not_printed(folder):
    """Lists that hold each other ten times over take no memory, and their text takes all of it."""
    nested = ["lol"] * 10
    for _ in range(12):
        nested = [nested] * 10
    change_metadata(folder, lambda metadata: place_elsewhere(metadata, nested))
    for read in (check_description, DcpReader):
        with pytest.raises(CheckpointError, match="relative_path of a tensor = a list: must be the plain name"):
            read(folder)


def save_compressed(value, file):
    """As torch.save, but compressed: torch reads it all the same."""
    plain = io.BytesIO()
    torch.save(value, plain)
    with zipfile.ZipFile(plain) as stored, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as compressed:
        for entry in stored.namelist():
            compressed.writestr(entry, stored.read(entry))
    assert str(torch.load(file, weights_only=True)) == str(value)


def test_compressed_values_are_refused_before_they_fill_the_memory(folder):
    save_compressed({}, folder / "common.pt")
    with pytest.raises(CheckpointError, match=r"common\.pt: .*it is compressed, and torch writes no such file"):
        check_description(folder)


def test_compressed_tensors_are_refused_by_every_reader(folder):
    from torch.distributed.checkpoint import FileSystemReader, load

    install()
    file = folder / "__0_0.distcp"
    save_compressed(torch.arange(6.0).reshape(2, 3), file)

    def whole(metadata):
        for info in metadata.storage_data.values():
            info.offset, info.length = 0, file.stat().st_size

    change_metadata(folder, whole)
    with DcpReader(folder) as reader, pytest.raises(CheckpointError, match="it is compressed"):
        reader.read("a")
    with pytest.raises(CheckpointException, match="it is compressed"):
        load({"a": torch.zeros(2, 3)}, storage_reader=FileSystemReader(folder), no_dist=True)


@pytest.mark.parametrize("name", ["/etc/passwd", "../other", "..", "", "a/b", "a" * 256])
def test_tensors_lie_in_the_checkpoint(folder, name):
    change_metadata(folder, lambda metadata: place_elsewhere(metadata, name))
    for read in (check_description, DcpReader):
        with pytest.raises(CheckpointError, match=rf"relative_path of a tensor = {shown_value(name)}: must be the "):
            read(folder)


def test_the_other_pickles_run_no_code_either(folder, tmp_path):
    torch.save({"args": Trap(tmp_path / "trap")}, folder / "common.pt")
    with pytest.raises(CheckpointError, match=r"common.pt: not readable without running code, or damaged"):
        check_description(folder)
    (folder / "common.pt").unlink()
    check_description(folder)
    (folder / "metadata.json").write_text('{"sharded_backend": "zarr", "sharded_backend_version": 1}')
    with pytest.raises(CheckpointError, match=r"metadata.json: .*sharded_backend must be 'torch_dist'"):
        check_description(folder)
    assert not (tmp_path / "trap").exists()


def test_objects_among_the_tensors_run_no_code(tmp_path):
    """Megatron from 0.19 on keeps there what 0.16 has in common.pt."""
    from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner

    def load(value):
        stream = io.BytesIO()
        torch.save(value, stream)
        stream.seek(0)
        planner = DefaultLoadPlanner(flatten_state_dict=False)
        planner.state_dict = {}
        planner.load_bytes(SimpleNamespace(dest_index=SimpleNamespace(fqn="a")), stream)
        return planner.state_dict["a"]

    install()
    install()  # once is enough
    assert load({"step": 3}) == {"step": 3}
    with pytest.raises(pickle.UnpicklingError, match="mkdir"):
        load(Trap(tmp_path / "trap"))
    assert not (tmp_path / "trap").exists()


@pytest.mark.parametrize("name", [".metadata", "common.pt", "metadata.json"])
def test_a_pipe_in_a_checkpoint_is_not_waited_for(folder, name):
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(CheckpointError, match=f"{name}: is a pipe"):
        check_description(folder)


def test_commands_run_no_code_of_a_checkpoint(tmp_path):
    model = save_model(tmp_path / "bert", "bert", tokenizer=True, num_hidden_layers=1)
    hf_to_megatron(model, tmp_path / "made")
    (tmp_path / "texts.jsonl").write_text('{"text": "one"}\n')
    encode = ["encode", "--model", str(tmp_path / "made"), "--input", str(tmp_path / "texts.jsonl"), "--output",
              str(tmp_path / "v.npy"), "--pooling", "mean"]
    ((code, _, err, _),) = run_on_ranks(command, 1, encode)
    assert code == 0, err
    (tmp_path / "v.npy").unlink()
    change_metadata(tmp_path / "made" / "model", lambda metadata: Trap(tmp_path / "trap"))
    for arguments in (encode, ["convert", "megatron-to-hf", str(tmp_path / "made"), str(tmp_path / "out")]):
        ((code, _, err, _),) = run_on_ranks(command, 1, arguments)
        assert (code, "Traceback" in err) == (2, False), err
        assert "code that a checkpoint names is never run" in err
    assert not any((tmp_path / name).exists() for name in ("trap", "v.npy", "out"))


@pytest.fixture
def run(tmp_path):
    """A run's directory with three complete checkpoints."""
    for step in (1, 2, 3):
        make_step(tmp_path / "run" / f"step_{step:06d}")
    (tmp_path / "run" / "latest").write_text("step_000003\n")
    return tmp_path / "run"


def make_step(path):
    (path / "model").mkdir(parents=True)
    (path / "megatron_embed.json").write_text("{}")
    (path / "model" / "x.distcp").write_text("x")


def move_away(folder, target):
    folder.rename(target)
    folder.symlink_to(target)


def test_pruning_removes_the_link_to_a_checkpoint_that_was_moved(run, tmp_path):
    move_away(run / "step_000001", tmp_path / "elsewhere")
    remove_old(run, 2)
    assert sorted(os.listdir(run)) == ["latest", "step_000002", "step_000003"]
    assert (tmp_path / "elsewhere" / "model" / "x.distcp").is_file()


def test_a_link_that_an_earlier_start_left_is_removed(run, tmp_path):
    move_away(run / "step_000001", tmp_path / "elsewhere")
    (run / "step_000001").rename(run / ".step_000001.old.tmp")
    (run / ".step_own.tmp").mkdir()  # no name that we make
    remove_unfinished(run)
    assert not os.path.lexists(run / ".step_000001.old.tmp")
    assert (run / ".step_own.tmp").is_dir()
    assert (tmp_path / "elsewhere" / "model" / "x.distcp").is_file()


def test_a_checkpoint_takes_the_place_of_a_link(run, tmp_path):
    move_away(run / "step_000003", tmp_path / "elsewhere")
    make_step(run / ".step_000003.tmp")
    replace_directory(run / ".step_000003.tmp", run / "step_000003")
    assert (run / "step_000003").is_dir()
    assert not (run / "step_000003").is_symlink()
    assert (tmp_path / "elsewhere" / "model" / "x.distcp").is_file()


@pytest.mark.parametrize("what", ["rmtree", "rename"])
def test_an_old_checkpoint_that_cannot_be_removed_is_a_warning(run, monkeypatch, caplog, what):
    def fail(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(*{"rmtree": (files.shutil, "rmtree"), "rename": (Path, "rename")}[what], fail)
    with caplog.at_level(logging.WARNING):
        remove_old(run, 1)
    assert sum("cannot be removed (Permission denied)" in line for line in caplog.messages) == 2
    assert latest_checkpoint(run) == run / "step_000003"


@pytest.mark.parametrize("said", ["..", "/etc", "../elsewhere", "step_000001/../../elsewhere", "a\0b"])
def test_latest_names_a_checkpoint_of_the_run(run, tmp_path, said):
    make_step(tmp_path / "elsewhere")
    (run / "latest").write_text(said + "\n")
    with pytest.raises(CheckpointError, match="latest: the checkpoint that it names = .*: must be the plain name"):
        latest_checkpoint(run)


def test_a_pointer_that_is_no_text_names_nothing(run):
    (run / "latest").write_bytes(b"\xff\xfe" * 10)
    assert latest_checkpoint(run) == run / "step_000003"


def test_assets_of_somebody_else_stay(tmp_path):
    own = tmp_path / ".assets"
    own.mkdir()
    (own / "logo.png").write_text("mine")
    with pytest.raises(CheckpointError, match=r"\.assets: was not made by megatron-embed.* another checkpoint.direct"):
        make_marked(own)
    assert (own / "logo.png").read_text() == "mine"
    (tmp_path / "link").symlink_to(own)
    (tmp_path / "file").write_text("mine")
    for name in ("link", "file"):
        with pytest.raises(CheckpointError, match="was not made by"):
            make_marked(tmp_path / name)
    assert (own / "logo.png").read_text() == "mine"


@pytest.mark.parametrize("left", [(), (MARK_FILE,), (MARK_FILE, "hf/config.json"), ("megatron_embed.json", "hf/x")])
def test_our_own_assets_are_made_anew(tmp_path, left):
    """Whatever a kill left of them; those of earlier versions have no mark but megatron_embed.json."""
    assets = tmp_path / "run" / ".assets"
    assets.mkdir(parents=True)
    for name in left:
        (assets / name).parent.mkdir(exist_ok=True)
        (assets / name).write_text("{}")
    make_marked(assets)
    assert os.listdir(assets) == [MARK_FILE]
    files.link_tree(assets, tmp_path / "copy")
    assert not os.listdir(tmp_path / "copy")


def test_our_files_are_not_written_through_links(run, tmp_path, monkeypatch):
    victim = tmp_path / "victim"
    victim.write_text("mine")
    for link in (run / ".latest.tmp", tmp_path / "status.0.tmp"):
        link.symlink_to(victim)
    write_atomically(run / "latest", "step_000002\n")
    monkeypatch.setenv(STATUS_FILE_VARIABLE, str(tmp_path / "status"))
    write_status(2, "a message")
    assert json.loads((tmp_path / "status").read_text())["exit_code"] == 2
    assert (run / "latest").read_text() == "step_000002\n"
    assert victim.read_text() == "mine"


@pytest.mark.parametrize("kind", ["link", "dangling", "pipe", "folder"])
def test_the_lock_is_an_ordinary_file(tmp_path, kind):
    lock, victim = tmp_path / ".lock", tmp_path / "victim"
    victim.write_text("mine")
    {"link": lambda: lock.symlink_to(victim), "dangling": lambda: lock.symlink_to(tmp_path / "absent"),
     "pipe": lambda: os.mkfifo(lock), "folder": lock.mkdir}[kind]()
    with pytest.raises(ConfigError, match=r"checkpoint.directory = .*\.lock cannot be opened"):
        _acquire("checkpoint.directory", lock)
    assert victim.read_text() == "mine"
    assert not (tmp_path / "absent").exists()


def test_the_lock_is_kept_and_names_its_holder(tmp_path):
    for _ in range(2):
        with _acquire("checkpoint.directory", tmp_path / ".lock"):
            assert f"process {os.getpid()}\n" in (tmp_path / ".lock").read_text()


def test_kernels_lie_in_a_folder_of_this_user_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(private_folder.tempfile, "tempdir", str(tmp_path))
    folder = private_folder.private_folder()
    assert (folder.parent, stat.S_IMODE(folder.stat().st_mode)) == (tmp_path, 0o700)
    assert private_folder.private_folder() == folder
    folder.chmod(0o777)  # somebody may have put something there
    assert private_folder.private_folder() != folder
    shutil.rmtree(folder)
    (tmp_path / "others").mkdir(mode=0o700)
    folder.symlink_to(tmp_path / "others")
    assert private_folder.private_folder() not in (folder, tmp_path / "others")
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    private_folder.keep_kernels_private()
    kernels = Path(os.environ["TRITON_CACHE_DIR"])
    assert (kernels.name, stat.S_IMODE(kernels.parent.stat().st_mode)) == ("triton", 0o700)
    monkeypatch.setenv("TRITON_CACHE_DIR", "/own")
    private_folder.keep_kernels_private()
    assert os.environ["TRITON_CACHE_DIR"] == "/own"


def test_pruning_keeps_what_it_kept(run):
    (run / "best").symlink_to("step_000001")
    remove_old(run, 1)
    assert list(step_directories(run)) == [1, 3]


@pytest.mark.parametrize("name, size", [("/etc/passwd", "1"), ("model/../../x", "1"), ("a" * 5000, "1"),
                                        ("a", "1e400")])
def test_checksums_name_files_of_the_checkpoint(tmp_path, name, size):
    (tmp_path / CHECKSUM_FILE).write_text(f'{{"{name}": [{size}, 0]}}')
    with pytest.raises(CheckpointError, match=rf"{CHECKSUM_FILE}: not readable"):
        changed_files(tmp_path)
