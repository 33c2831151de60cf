"""Loading the tokenizer of a model directory with Transformers, which may fail in any way on a damaged file."""

from pathlib import Path
from typing import Any

from tokenizers import normalizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from megatron_embed.config.json_file import read_optional_json_object
from megatron_embed.data.jsonl import shortened
from megatron_embed.data.normalizer_growth import refuse_growth_in_file, refuse_growth_of
from megatron_embed.data.vocabulary import has_tokenizer_files, loading_error, refuse_large_files
from megatron_embed.errors import CheckpointError, first_line

_RARE_CHARACTERS = "\u4e15 \ua015 \u2603"
"""An ideograph, a syllable of Yi and a snowman: hardly in the vocabulary of a tokenizer that has no bytes."""


def load_tokenizer(model_dir: str, vocab_size: int | None, *, added_may_exceed: bool = False) -> Any:
    """The tokenizer of a model directory; never fetched.

    Args:
        vocab_size: rows of the model's word embeddings; None: ids are not compared with it.
        added_may_exceed: tokens that were added to the vocabulary may lack a row; the caller then checks the ids.
    Raises:
        CheckpointError: the tokenizer cannot be used, or has a token that the model lacks a row for.
    """
    directory = Path(model_dir)
    if not directory.is_dir():
        raise CheckpointError(f"{model_dir}: no such directory; name a model directory with tokenizer files")
    if not has_tokenizer_files(directory):
        raise CheckpointError(f"{model_dir}: no tokenizer files; copy tokenizer.json and tokenizer_config.json of the "
                              "model into it")
    refuse_large_files(directory)
    refuse_growth_in_file(directory)
    try:
        tokenizer = open_tokenizer(directory)
        refuse_growth_of(tokenizer, model_dir)
        tokenizer(["a b"], verbose=False)  # some wrong values are only read here, such as a list for model_max_length
        _require_unknown_token(tokenizer, directory)
    except CheckpointError:
        raise
    except Exception as error:  # all of them: the tokenizers library raises bare Exception for a damaged file
        raise loading_error(directory, error) from error
    if vocab_size is not None:
        # Refused here, before the first text: a rank that holds no such row would look up zeros, another would fail.
        added = set(tokenizer.added_tokens_decoder) if added_may_exceed else set()
        ids = (item for item in tokenizer.get_vocab().items() if item[1] not in added)
        token, largest = max(ids, key=lambda item: item[1], default=("", -1))
        if largest >= vocab_size:
            raise CheckpointError(f"{model_dir}: its tokenizer gives {shortened(token)} the id {largest}, but the "
                                  f"model ends at id {vocab_size - 1} (config.json: vocab_size = {vocab_size}); copy "
                                  "the model's own tokenizer there, or give the model more rows (Transformers: "
                                  "resize_token_embeddings)")
    return tokenizer


def _require_unknown_token(tokenizer: Any, directory: Path) -> None:
    """Refuse a tokenizer that raises at the first text with a character or word that its vocabulary lacks."""
    try:
        tokenizer([_RARE_CHARACTERS], verbose=False)
    except Exception as error:  # the tokenizers library raises a bare Exception
        raise CheckpointError(f"{directory}: the tokenizer fails at a text with characters that its vocabulary lacks "
                              f"({first_line(error)}): its unknown token (unk_token = "
                              f"{shortened(str(tokenizer.unk_token))}) must be in the vocabulary; correct unk_token in "
                              "special_tokens_map.json, tokenizer_config.json and tokenizer.json") from error


def open_tokenizer(directory: Path) -> Any:
    """The tokenizer as Transformers loads it; InternLM's, whose classes are code that comes with the model, by its
    tokenizer.json alone. May raise anything."""
    values = read_optional_json_object(directory / "tokenizer_config.json")
    if not str(values.get("tokenizer_class")).startswith("InternLM"):
        return AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    if not (directory / "tokenizer.json").is_file():
        raise ValueError(f"tokenizer_class = {values['tokenizer_class']!r} is code that comes with the model, which is "
                         "never run, and there is no tokenizer.json, which needs none; if you trust that code, let "
                         "Transformers' AutoTokenizer write one (trust_remote_code=True, save_pretrained)")
    return PreTrainedTokenizerFast.from_pretrained(directory, local_files_only=True)


def add_lowercase(tokenizer: Any) -> None:
    """Make a fast tokenizer lowercase every text first, unless it does so already.

    Raises:
        CheckpointError: it is a slow one.
    """
    if not tokenizer.is_fast:
        raise CheckpointError(f"{tokenizer.name_or_path}: sentence_bert_config.json says do_lower_case = True, and the "
                              "tokenizer is a slow one, which cannot be made to; save it once with Transformers as "
                              "tokenizer.json")
    own = tokenizer.backend_tokenizer.normalizer
    steps = [] if own is None else list(own) if isinstance(own, normalizers.Sequence) else [own]
    if not any(isinstance(step, normalizers.Lowercase) for step in steps):
        tokenizer.backend_tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), *steps])
