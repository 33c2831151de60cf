"""`encode` into a directory: the vectors of one file, in shards, written by ranks in turn and gone on with."""

import json
import os

import numpy as np
import pytest

from megatron_embed.evaluation import vector_files
from megatron_embed.evaluation.vector_files import SUMMARY, ShardWriter, VectorFile
from tests.helpers.ranks import run_on_ranks
from tests.helpers.refusals import assert_refused, command, model  # noqa: F401


@pytest.fixture
def texts(tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": f"text number {row} " + "and more " * (row % 5), "title": "T"}) + "\n"
                            for row in range(45)))
    return str(path)


def encode_in_shards(arguments, shard_bytes, fails_at=None):
    """Called by all ranks. `fails_at`: the shard at which the command ends as if it was killed."""
    vector_files.SHARD_BYTES, vector_files._ROWS_MULTIPLE = shard_bytes, 1
    write = ShardWriter.write

    def write_or_fail(self, shard, vectors):
        if shard == fails_at:
            raise KeyboardInterrupt
        return write(self, shard, vectors)

    ShardWriter.write = write_or_fail
    try:
        return command(["encode", *arguments])
    except KeyboardInterrupt:
        return (130, "", "")
    finally:
        ShardWriter.write = write
        vector_files.SHARD_BYTES, vector_files._ROWS_MULTIPLE = 256 << 20, 4096


@pytest.mark.slow
def test_shards_hold_the_vectors_of_one_file_and_are_gone_on_with(model, texts, tmp_path):
    whole, shards = str(tmp_path / "whole.npy"), tmp_path / "shards"
    arguments = ["--model", model, "--input", texts, "--role", "document"]
    run_on_ranks(command, 1, ["encode", *arguments, "--output", whole])
    vectors = np.load(whole)
    size = 4 * vectors.shape[1] * 2  # four vectors of float16 in a shard
    half = [*arguments, "--output", str(shards), "--output-dtype", "float16"]
    assert run_on_ranks(encode_in_shards, 1, half, size, fails_at=5)[0][0] == 130
    assert sorted(os.listdir(shards)) == [*(f"{shard:06d}.npy" for shard in range(5)), SUMMARY]
    before = {name: os.stat(shards / name).st_mtime_ns for name in os.listdir(shards)}
    with pytest.raises(Exception, match="20 of 45 vectors are there; run the same `megatron-embed encode` again"):
        VectorFile(str(shards), "--vectors", similarity="dot")
    results = run_on_ranks(encode_in_shards, 2, half, size)
    assert [result[0] for result in results] == [0, 0]
    assert {name: os.stat(shards / name).st_mtime_ns for name in before} == before
    file = VectorFile(f"{shards}/", "--vectors", similarity="dot")
    assert len(file) == 45 and len(os.listdir(shards)) == 13
    assert np.array_equal(file.rows(0, 45).numpy(), vectors.astype(np.float16).astype(np.float32))
    assert np.array_equal(file.rows(3, 9).numpy(), file.rows(0, 45)[3:9].numpy())
    assert np.array_equal(file.row(44).numpy(), file.rows(0, 45)[44].numpy())
    assert file.digest() != VectorFile(whole, "--vectors", similarity="dot").digest()
    for other, message in ((["--output-dtype", "float32"], "holds vectors with dtype = 'float16', and these have"),
                           (["--role", "query"], "holds vectors with role = 'document', and these have 'query'")):
        assert_refused(run_on_ranks(encode_in_shards, 2, [*half, *other], size), message)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("x")
    assert_refused(run_on_ranks(command, 1, ["encode", *arguments, "--output", str(tmp_path / "other")]),
                   "holds files that are no vectors")
