"""Documents that are never negatives of a query although no row labels them positive.

These are other forms of a positive, and the query's own text. A document is another form of a positive if both share an
id, or if their texts are equal up to whitespace: with or without the positive's title, or, if the positive has no id,
without the document's title.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple


class NamedDocument(NamedTuple):
    """A document in a row or in the corpus; several of them may be one document of a task."""

    document: int
    """Index of the task's document with this text."""
    text: str
    title_length: int
    """Characters of the leading title and the space after it; 0: no known title."""
    name: str | None
    """Its id."""

    @property
    def forms(self) -> tuple[str, str]:
        """(whole text, text without the title) with normalized whitespace; equal without a known title."""
        whole = normalize_whitespace(self.text)
        return whole, normalize_whitespace(self.text[self.title_length:]) if self.title_length else whole


@dataclass
class Forms:
    """Texts and ids by which other forms of some documents are recognized."""

    texts: set[str] = field(default_factory=set)
    """With and without a title; compared with whole documents, since other documents may share the text alone."""
    without_id: set[str] = field(default_factory=set)
    """Whole texts of documents without an id; compared with documents without their titles."""
    names: set[str] = field(default_factory=set)

    def add(self, document: NamedDocument) -> None:
        """Add the forms of a document."""
        self.texts.update(document.forms)
        if document.name is not None:
            self.names.add(document.name)
        else:
            self.without_id.add(document.forms[0])

    def merge(self, other: "Forms") -> None:
        """Add the forms of another object."""
        self.texts |= other.texts
        self.without_id |= other.without_id
        self.names |= other.names


def normalize_whitespace(text: str) -> str:
    """The text with single spaces between words; a title may be on a line of its own."""
    return " ".join(text.split())


def never_negatives(documents: Callable[[], Iterator[NamedDocument]], positives: Mapping[str, Collection[int]],
                    positive_forms: Mapping[str, Forms], *, query_too: bool) -> dict[str, list[int]]:
    """For each query its positives, then their other forms, and with `query_too` documents equal to the query.

    Args:
        documents: returns a new iterator over all documents; called three times, so that memory holds only the matches.
        positives: documents by query.
        positive_forms: forms of the positives by query, as the rows have them.
    """
    matches = _Matches(documents(), positive_forms.values())
    same = {query: {*own, *matches.of(positive_forms[query])} for query, own in positives.items()}
    wanted, forms_of = set().union(*same.values()), dict[int, Forms]()
    for named in documents():
        if named.document in wanted:
            forms_of.setdefault(named.document, Forms()).add(named)
    all_forms = {}
    for query, members in same.items():
        all_forms[query] = Forms(texts={normalize_whitespace(query)} if query_too else set())
        for document in members & forms_of.keys():
            all_forms[query].merge(forms_of[document])
    matches = _Matches(documents(), all_forms.values())
    return {query: list(dict.fromkeys([*own, *sorted(same[query] | matches.of(all_forms[query]))]))
            for query, own in positives.items()}


class _Matches:
    """Documents that have one of the wanted forms, by form."""

    def __init__(self, documents: Iterator[NamedDocument], wanted: Collection[Forms]) -> None:
        every = Forms()
        for forms in wanted:
            every.merge(forms)
        self._by_whole: dict[str, set[int]] = {}
        self._by_untitled: dict[str, set[int]] = {}
        self._by_name: dict[str, set[int]] = {}
        for named in documents:
            whole, untitled = named.forms
            if whole in every.texts:
                self._by_whole.setdefault(whole, set()).add(named.document)
            if untitled in every.without_id:
                self._by_untitled.setdefault(untitled, set()).add(named.document)
            if named.name is not None and named.name in every.names:
                self._by_name.setdefault(named.name, set()).add(named.document)

    def of(self, forms: Forms) -> set[int]:
        """Documents that have one of these forms."""
        lists = [*(self._by_whole.get(text, ()) for text in forms.texts),
                 *(self._by_untitled.get(text, ()) for text in forms.without_id),
                 *(self._by_name.get(name, ()) for name in forms.names)]
        return set().union(*lists)
