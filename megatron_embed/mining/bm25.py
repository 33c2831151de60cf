"""Mine hard negatives with BM25 (library bm25s) over tokens that work for every script."""

import re
import unicodedata

from tqdm import tqdm

from megatron_embed.errors import ConfigError
from megatron_embed.mining.filters import MiningOptions, select_negatives
from megatron_embed.mining.task import Mined, MiningTask

_WITHOUT_SPACES = ("\u2e80-\u2fdf\u3005-\u3007\u3021-\u3029\u3031-\u3035\u303b\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf"
                   "\u4e00-\u9fff\uf900-\ufaff\uac00-\ud7af\u1100-\u11ff\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"
                   "\U00020000-\U0003ffff")
"""Han, Kana, Hangul, Thai, Lao, Burmese, Khmer: no spaces between words, or (Hangul) long compound words."""
_RUNS = re.compile(rf"(?P<bigrams>[{_WITHOUT_SPACES}]+)|[^\W{_WITHOUT_SPACES}]+")


def bm25_tokens(text: str) -> list[str]:
    """Lower-case words after NFKC normalization; overlapping character bigrams for scripts without spaces.

    A single character of such a script is one token. Lucene treats Chinese, Japanese and Korean in this way: no
    dictionary, no stop words.
    """
    tokens = []
    for match in _RUNS.finditer(unicodedata.normalize("NFKC", text).casefold()):
        run = match.group()
        if match.group("bigrams") is None or len(run) == 1:
            tokens.append(run)
        else:
            tokens += [run[start:start + 2] for start in range(len(run) - 1)]
    return tokens


def mine_bm25(task: MiningTask, options: MiningOptions, *, show_progress: bool = False) -> list[Mined]:
    """Negatives of every query by BM25 score (Lucene's variant, k1 = 1.5, b = 0.75), in the library's order.

    A document that shares no token with the query is not a candidate. One process; no communication.

    Raises:
        ConfigError: bm25s is not installed.
    """
    try:
        import bm25s
    except ImportError as error:
        raise ConfigError("--model bm25 needs the library bm25s; install it: pip install 'megatron_embed[mining]'"
                          ) from error
    index = bm25s.BM25(method="lucene", k1=1.5, b=0.75)
    index.index([bm25_tokens(text) for text in tqdm(task.documents, desc="tokenize", unit="document",
                                                    disable=None if show_progress else True)], show_progress=False)
    last_rank = options.last_rank(task.most_positives)
    depth = min(last_rank + task.most_excluded, len(task.documents))
    mined = []
    for query, text in enumerate(tqdm(task.queries, desc="search", unit="query",
                                      disable=None if show_progress else True)):
        tokens = bm25_tokens(text)
        candidates: list[tuple[int, float]] = []
        positive_scores = [0.0] * len(task.positives[query])
        if tokens:
            scores = index.get_scores(tokens)
            values, documents = bm25s.selection.topk(scores, depth, backend="numpy", sorted=True)
            candidates = [(int(document), float(value)) for document, value in zip(documents, values, strict=True)
                          if value > 0]
            positive_scores = [float(scores[document]) for document in task.positives[query]]
        selection = select_negatives(candidates, frozenset(task.excluded[query]), positive_scores, options,
                                     last_rank=last_rank, query=query)
        mined.append(Mined(positive_scores=positive_scores, negatives=selection.negatives,
                           skipped=selection.skipped))
    return mined
