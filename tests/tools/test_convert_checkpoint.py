"""The converter with Megatron's argument names: both directions, options without effect, contradictions."""

import contextlib
import importlib.util
import io

import pytest

from tests.helpers.tensor_files import assert_bit_equal, tensors_of
from tests.helpers.toys import REPOSITORY, save_toy

spec = importlib.util.spec_from_file_location("convert_checkpoint", REPOSITORY / "tools" / "convert_checkpoint.py")
front = importlib.util.module_from_spec(spec)
spec.loader.exec_module(front)


def call(*arguments):
    """(exit code, stdout, stderr)"""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = front.main([str(argument) for argument in arguments])
    return code, out.getvalue(), err.getvalue()


def test_both_directions(tmp_path):
    source = save_toy(tmp_path / "source", "Qwen3ForCausalLM", tie_word_embeddings=False)
    code, out, err = call("--model-type", "GPT", "--loader", "llama_mistral", "--saver", "core", "--load-dir", source,
                          "--save-dir", tmp_path / "there", "--target-tensor-parallel-size", 8,
                          "--target-pipeline-parallel-size", "2", "--model-size", "qwen2.5", "--checkpoint-type", "hf")
    assert code == 0, err
    assert out.startswith(f"{tmp_path / 'there'}: ")
    lines = [line for line in err.splitlines() if line.startswith("--")]
    assert lines[0].startswith("--target-tensor-parallel-size 8 has no effect: the checkpoint has no parallel sizes")
    assert [line.split()[0] for line in lines] == [
        "--target-tensor-parallel-size", "--target-pipeline-parallel-size", "--model-size", "--checkpoint-type"]
    code, _, err = call("--model-type", "GPT", "--loader", "core", "--saver", "hf", "--load-dir", tmp_path / "there",
                        "--save-dir", tmp_path / "back")
    assert code == 0, err
    assert_bit_equal(tensors_of(tmp_path / "back"), tensors_of(source))
    code, out, err = call("--load-dir", tmp_path / "there", "--save-dir", tmp_path / "half", "--bf16", "--no-checking")
    assert code == 0, err
    assert "(--no-compare)" in out
    assert_bit_equal(tensors_of(tmp_path / "half"),
                     {name: tensor.bfloat16() for name, tensor in tensors_of(source).items()})


@pytest.mark.parametrize("options, words", [
    (["--loader", "core"], "--loader core does not fit: --load-dir {source} is not a checkpoint of megatron-embed; "
                           "give --loader hf"),
    (["--saver", "hf"], "--saver hf does not fit: --load-dir {source} is not a checkpoint"),
    (["--model-type", "GPT"], "--model-type GPT does not fit: {source} holds a bert model; give --model-type BERT"),
    (["--model-type", "T5"], "invalid choice: 'T5'"),
    (["--bf16"], "--bf16 is for Hugging Face directories"),
    (["--target-tensor-parallel-siz", "2"], "unrecognized arguments"),
])
def test_contradictions_are_refused_in_one_line(options, words, tmp_path):
    source = save_toy(tmp_path / "source", "BertModel")
    code, out, err = call("--load-dir", source, "--save-dir", tmp_path / "out", *options)
    assert (code, out) == (2, "")
    assert words.format(source=source) in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()
