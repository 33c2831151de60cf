"""The data of another trainer in ours: files, columns, prompts and lengths."""

import os
import re

from megatron_embed.config.data import TrainFile
from megatron_embed.config.foreign_values import plain
from megatron_embed.config.objective import LABELLED_PAIRS, WITH_HARD_NEGATIVES
from megatron_embed.data.formats import RowReader
from megatron_embed.data.records import Kind, Record
from megatron_embed.data.row_source import files_of, open_rows
from megatron_embed.errors import UserError
from megatron_embed.init.draft import Draft
from megatron_embed.init.foreign_settings import Setting
from megatron_embed.init.translate_loss import ALL_NEGATIVES_NOTE

_ROWS_LOOKED_AT = 1000
_LARGEST_COUNTED = 64 << 20
"""Bytes of the files from which on their rows are not counted."""

_PATH_KEYS = ("path", "local_csv", "local_jsonl", "local_file", "file", "file_name", "hf_dataset", "ms_dataset",
              "dataset", "dataset_id", "dataset_name", "name", "data_files", "local")
_FIELDS = (("anchor_column", "query"), ("positive_column", "positive"), ("negative_column", "negatives"),
           ("target_column", "score"))
_FILE = re.compile(r".*\.(jsonl?|csv|tsv|parquet|arrow|xlsx?|txt)(\.gz|\.zst)?")


def translate_data(draft: Draft) -> None:
    """Put the section `data` into the draft, except for the number of negatives."""
    train, comment = _entries(draft, "dataset")
    corpus = draft.settings.take("corpus_name")
    named = _hub_entry(draft)
    if named is not None and not train:
        train, comment = named
    elif named is not None:
        draft.remark(f"{named[1]}: the library that reads the file; not needed")
    if corpus is not None and train:
        for entry in train:
            entry["corpus"] = str(corpus.value)
        comment = f"{comment}, {corpus.written}"
    if not train:
        train, comment = [{"path": "train.jsonl"}], "no data is named: a file of rows, as in docs/data.md"
    comment = ", ".join([comment, *_add_to_entries(draft, train)])
    _look_at_rows(draft, train)
    short = [entry["path"] if list(entry) == ["path"] else entry for entry in train]
    draft.set("data.train", short if all(isinstance(entry, str) for entry in short) else train, comment)
    _translate_validation(draft)
    _translate_order(draft, len(train))
    _translate_lengths(draft)
    if not draft.is_reranker:
        _translate_prompts(draft)
    else:
        _translate_pair_prompt(draft)


def _entries(draft: Draft, name: str) -> tuple[list[dict[str, object]], str]:
    """Entries of `data.train` or `data.validation`, and the comment."""
    setting = draft.settings.take(name)
    if setting is None:
        return [], ""
    values = setting.value if isinstance(setting.value, list) else [setting.value]
    entries: list[dict[str, object]] = []
    other_hub = draft.trainer == "ms-swift" and str(draft.settings.peek("use_hf")).lower() not in ("true", "1")
    for value in values:
        elsewhere = other_hub and not (isinstance(value, dict) and "hf_dataset" in value)
        if isinstance(value, dict):
            paths = [str(value[key]) for key in _PATH_KEYS if isinstance(value.get(key), str)]
            if not paths:
                draft.remark(f"{name}: {value}: not needed; every row is checked before the first step")
            values_here = paths[:1]
        else:
            values_here = [part for part in str(value).split(",") if part] if "," in str(value) else [str(value)]
        for path in values_here:
            entries += _entry(draft, path, elsewhere)
    return entries, setting.written if len(setting.written) < 200 else f"{name} there"


def _entry(draft: Draft, path: str, elsewhere: bool) -> list[dict[str, object]]:
    """The entries of one data set, in ms-swift's spelling `ID_OR_PATH:subset/subset#count` too.

    Args:
        elsewhere: the other trainer takes it from ModelScope's hub.
    """
    body, mark, count = path.partition("#")
    if mark and not count.isdecimal():
        body, count = path, ""
    name, colon, subset = body.rpartition(":") if re.match(r"[\w./-]+:[\w./-]+$", body) else (body, "", "")
    if _is_file(body):
        if count:
            draft.remark(f"{path}: {count} rows at random; a file is read whole here, so write those rows into a file")
        return [{"path": body}]
    name = name if colon else body
    if elsewhere:
        draft.remark(f"{path}: from the Hugging Face hub here; ms-swift takes ModelScope's unless use_hf is set")
    if draft.trainer == "ms-swift" and name == "sentence-transformers/stsb" and subset == "positive":
        draft.remark(f"{path}: `positive` is ms-swift's selection of the pairs with a score of 0.75 or more, which "
                     "the hub does not have; here all pairs are read, so write those rows into a file for the same")
        subset = ""
    entries = []
    for part in subset.split("/") if subset and draft.trainer == "ms-swift" else [subset]:
        entry: dict[str, object] = {"path": f"{name}:{part}" if part and part != "default" else name}
        if count:
            entry |= {"streaming": True, "rows": int(count)}
            draft.remark(f"{path}: the first {count} rows here, {count} rows at random there")
        entries.append(entry)
    return entries


def _is_file(path: str) -> bool:
    """Whether a data set is a file or folder of a machine; otherwise it is one of the hub."""
    return _FILE.fullmatch(path) is not None or os.path.exists(path) or path.startswith((".", "/", "~"))


def _hub_entry(draft: Draft) -> tuple[list[dict[str, object]], str] | None:
    """The entry of dataset_name with dataset_config and dataset_split, and the comment; None if it is not given."""
    name, config = draft.settings.take("dataset_name"), draft.settings.take("dataset_config")
    split = draft.settings.take("dataset_split")
    if name is None:
        return None
    if plain(name.value) in ("json", "csv", "parquet", "text"):
        return [], name.written
    path = str(name.value)
    written = [name.written]
    if _is_file(path):  # data sets of the hub alone have configurations and splits
        return [{"path": path}], ", ".join(part.written for part in (name, config, split) if part is not None)
    if config is not None or (split is not None and split.value != "train"):
        path += f":{config.value if config else 'default'}"
        written += [config.written] if config else []
    if split is not None and split.value != "train":
        path += f"/{split.value}"
        written.append(split.written)
    return [{"path": path}], ", ".join(written)


def _add_to_entries(draft: Draft, entries: list[dict[str, object]]) -> list[str]:
    """Put columns, weights and in_batch_negatives into the entries; the settings with columns, as they were written."""
    columns: dict[str, str] = {}
    written: list[str] = []
    mapping = draft.settings.take("columns")
    if mapping is not None and isinstance(mapping.value, dict):
        columns = {str(name): str(field) for name, field in mapping.value.items()}
        written.append(mapping.written)
    for name, field in _FIELDS:
        if (setting := draft.settings.take(name)) is not None:
            columns[str(setting.value)] = field
            written.append(setting.written)
    weights = draft.settings.take("interleave_prob")
    shares = weights.value if weights is not None and isinstance(weights.value, list) else []
    use_batch = draft.flag("infonce_use_batch")
    apart = draft.flag("same_dataset_within_batch")
    for index, entry in enumerate(entries):
        if columns:
            entry["columns"] = {name: field for name, field in columns.items() if name != field}
        if index < len(shares) and len(entries) > 1:
            entry["weight"] = float(shares[index])
        suffix = str(entry["path"]).removesuffix(".jsonl").removesuffix(".json").endswith("no_in_batch_neg")
        if (use_batch is not None and not use_batch[0]) or (suffix and apart is not None and apart[0]):
            entry["in_batch_negatives"] = False
    if shares and len(entries) > 1:
        draft.remark("weights are relative to the rows of each file here; there they are probabilities of a row")
    return written


def _look_at_rows(draft: Draft, entries: list[dict[str, object]]) -> None:
    """Compare the first rows of the files that are on this machine with the loss; count their negatives, and rows."""
    loss, most = draft.value("objective.loss"), 0
    kind: Kind = "rerank" if draft.is_reranker else "pairs" if loss in LABELLED_PAIRS else "contrastive"
    num_rows, counts_all = 0, True
    for entry in entries:
        path = str(entry["path"])
        files = [path] if os.path.isfile(path) else files_of(path)
        if not files:
            counts_all = False
            continue
        counts = sum(map(os.path.getsize, files)) <= _LARGEST_COUNTED
        counts_all &= counts
        columns = entry.get("columns")
        file = TrainFile(path=path, columns=columns if isinstance(columns, dict) else {})
        try:
            rows = open_rows(path, "data.train")
            reader = RowReader(file, kind, holds_texts=rows.holds_texts)
            for number, (row, source) in enumerate(rows.scan()):
                if number < _ROWS_LOOKED_AT:
                    record = reader.read(row, source)
                    most = max(most, len(record.negatives) if isinstance(record, Record) else 0)
                elif not counts:
                    break
                num_rows += 1
        except UserError as error:
            draft.remark(f"THE ROWS DO NOT FIT: {error}")
            return
    draft.num_rows = num_rows if counts_all else None
    negatives = draft.values.get("data.num_negatives")
    if num_rows and negatives is not None and negatives[1] == ALL_NEGATIVES_NOTE:
        needed = loss in WITH_HARD_NEGATIVES or any(entry.get("in_batch_negatives") is False for entry in entries)
        draft.set("data.num_negatives", max(most, int(needed)),
                  f"all that a row has, by the first {_ROWS_LOOKED_AT} rows of each file")


def _translate_validation(draft: Draft) -> None:
    entries, comment = _entries(draft, "val_dataset")
    share = draft.number("split_dataset_ratio", "data.validation_fraction")
    strategy = draft.settings.peek("eval_strategy")
    if strategy is not None and plain(strategy) in ("no", "false"):
        if entries:
            draft.remark(f"{comment}: eval_strategy is no, so nothing is evaluated")
        return
    if entries:
        short = [entry["path"] if list(entry) == ["path"] else entry for entry in entries]
        draft.set("data.validation", short, comment)
    elif share is not None and share[0] > 0:
        value = share[0] / 100 if share[0] >= 1 else share[0]
        draft.set("data.validation_fraction", value, share[1])


def _translate_order(draft: Draft, num_entries: int) -> None:
    shuffle = draft.settings.take("shuffle")
    streaming = draft.settings.take("streaming")
    if shuffle is not None and plain(shuffle.value) in ("false", "no", "0"):
        draft.set("data.shuffle", False, shuffle.written)
        return
    if streaming is not None and plain(streaming.value) == "true":
        draft.remark(f"{streaming.written}: streaming: true in an entry of data.train; files need it not, they are "
                     "read row by row")
    apart = draft.settings.take("same_dataset_within_batch")
    if num_entries > 1 and (apart is None or plain(apart.value) in ("false", "proportional", "roundrobin")):
        mixes = draft.trainer in ("FlagEmbedding", "Tevatron", "Transformers", "ms-swift") and (
            apart is None or plain(apart.value) == "false")
        if mixes:
            draft.set("data.mixed_batches", True, "as there: a batch holds rows of all data sets")


def _translate_lengths(draft: Draft) -> None:
    both = draft.whole("max_length", "data.document_max_length")
    query = draft.whole("query_max_len", "data.query_max_length")
    document = draft.whole("passage_max_len", "data.document_max_length")
    if draft.is_reranker:
        if both is not None:
            draft.set("reranker.max_length", both[0], f"{both[1]}: tokens of a pair")
        elif query is not None and document is not None:
            draft.set("reranker.max_length", query[0] + document[0], f"{query[1]} + {document[1]}: tokens of a pair")
        own = [part[1] for part in (query, document) if part is not None and both is not None]
        if own:
            draft.remark(f"{', '.join(own)}: not supported: query and document have no limits of their own, a pair is "
                         "cut at reranker.max_length, at the end of its document")
        return
    if both is not None and query is None:
        draft.set("data.query_max_length", both[0], both[1])
    if both is not None and document is None:
        draft.set("data.document_max_length", both[0], both[1])
    for key, given in (("data.query_max_length", query), ("data.document_max_length", document)):
        if given is not None:
            draft.set(key, given[0], given[1])


def _translate_prompts(draft: Draft) -> None:
    """Prefixes, instructions with a format, and Sentence Transformers' prompts by column."""
    _instructed(draft, "query_prefix", "query_instruction_format", "query")
    _instructed(draft, "passage_prefix", "passage_instruction_format", "document")
    prompts = draft.settings.take("prompts")
    if prompts is not None and isinstance(prompts.value, str):
        for role in ("query", "document"):
            draft.set(f"data.{role}_prompt", prompts.value, prompts.written)
    elif prompts is not None and isinstance(prompts.value, dict):
        for column, prompt in prompts.value.items():
            role = "query" if plain(column) in ("anchor", "query", "question", "sentence1", "prompt") else "document"
            draft.set(f"data.{role}_prompt", str(prompt), f"{prompts.written.split()[0].rstrip(':')}: {column}")
    system = draft.settings.take("system")
    if system is not None:
        draft.set("data.query_prompt", f"{system.value} ", f"{system.written}: before every query")


def _instructed(draft: Draft, prefix: str, form: str, role: str) -> None:
    """One role's prompt, from its text and the format that FlagEmbedding puts it in."""
    text, given_form = draft.settings.take(prefix), draft.settings.take(form)
    if text is None or text.value in (None, ""):
        return
    instruction = str(text.value).replace("\\n", "\n")
    key = f"data.{role}_prompt"
    if "instruction" not in text.written.partition(" ")[0] or "prompt" in text.written.partition(" ")[0]:
        draft.set(key, instruction, text.written)
        return
    pattern = str(given_form.value).replace("\\n", "\n") if given_form is not None else "{}{}"
    before, _, after = pattern.partition("{}")
    if not after.endswith("{}") or "{}" in after[:-2]:
        draft.remark(f"{given_form.written if given_form else ''}: not a format that ends with the text; set {key}")
        return
    comment = text.written if given_form is None else f"{text.written}, {given_form.written}"
    if role == "document":
        draft.set(key, f"{before}{instruction}{after[:-2]}", comment)
        return
    draft.set(key, f"{before}{{instruction}}{after[:-2]}",
              f"{_written_form(given_form)}; `prompt` of a row takes its place")
    draft.set("embedding.instruction", instruction, text.written)


def _written_form(setting: Setting | None) -> str:
    return setting.written if setting is not None else "FlagEmbedding's format {}{}"


def _translate_pair_prompt(draft: Draft) -> None:
    """Prefixes of a reranker: parts of its template."""
    parts = [draft.settings.take(name) for name in ("query_prefix", "passage_prefix", "query_instruction_format",
                                                    "passage_instruction_format", "sep_token", "system")]
    written = [part.written for part in parts if part is not None and part.value not in (None, "", "{}{}")]
    if written:
        draft.remark(f"{', '.join(written)}: write the whole text of a pair as reranker.template, with {{query}} and "
                     "{document} (decoders; encoders take a pair of texts)")
