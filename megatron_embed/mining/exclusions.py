"""Documents that are never negatives of a query although no row calls them positive: other forms of a positive, and the
query itself.

A document is another form of a positive if both have an id in common, or if their texts are equal apart from blanks,
with or without the positive's title, or, where the positive has no id, without the document's.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple


class NamedDocument(NamedTuple):
    """A document as a row or the corpus has it; several of them may be one document of a task."""

    number: int
    """Of the task's document with this text."""
    text: str
    title_length: int
    """Characters of the title in front, with the blank behind it; 0: no title is known."""
    name: str | None
    """Its id."""

    @property
    def forms(self) -> tuple[str, str]:
        """(whole text, text without the title), blanks made equal; both are the same where no title is known."""
        return (whole := plain(self.text)), plain(self.text[self.title_length:]) if self.title_length else whole


@dataclass
class Forms:
    """What other forms of some documents are known by."""

    texts: set[str] = field(default_factory=set)
    """With and without a title: compared with documents as they are, since other documents may share a text alone."""
    nameless: set[str] = field(default_factory=set)
    """Whole texts of documents without an id: compared with documents without their titles."""
    names: set[str] = field(default_factory=set)

    def add(self, document: NamedDocument) -> None:
        """The forms of one more document."""
        self.texts.update(document.forms)
        if document.name is not None:
            self.names.add(document.name)
        else:
            self.nameless.add(document.forms[0])

    def merge(self, other: "Forms") -> None:
        """The forms of both."""
        self.texts |= other.texts
        self.nameless |= other.nameless
        self.names |= other.names


def plain(text: str) -> str:
    """The text with single blanks between its words: a title may stand in a line of its own."""
    return " ".join(text.split())


def never_negatives(documents: Callable[[], Iterator[NamedDocument]], positives: Mapping[str, Collection[int]],
                    positive_forms: Mapping[str, Forms], *, query_too: bool) -> dict[str, list[int]]:
    """By query: its positives, then all other forms of these, and documents equal to the query where `query_too`.

    Args:
        documents: gives all of them anew at each call; it is called three times, and nothing of the others is held.
        positives: by query, numbers of documents.
        positive_forms: by query, what is known of the same from the rows.
    """
    found = _Matches(documents(), positive_forms.values())
    meant = {query: {*numbers, *found.of(positive_forms[query])} for query, numbers in positives.items()}
    wanted, forms_of = set().union(*meant.values()), dict[int, Forms]()
    for document in documents():
        if document.number in wanted:
            forms_of.setdefault(document.number, Forms()).add(document)
    all_forms = {}
    for query, numbers in meant.items():
        all_forms[query] = Forms(texts={plain(query)} if query_too else set())
        for number in numbers & forms_of.keys():
            all_forms[query].merge(forms_of[number])
    found = _Matches(documents(), all_forms.values())
    return {query: list(dict.fromkeys([*numbers, *sorted(meant[query] | found.of(all_forms[query]))]))
            for query, numbers in positives.items()}


class _Matches:
    """Numbers of the documents that have one of some forms, by form."""

    def __init__(self, documents: Iterator[NamedDocument], wanted: Collection[Forms]) -> None:
        every = Forms()
        for forms in wanted:
            every.merge(forms)
        self._by_whole: dict[str, set[int]] = {}
        self._by_untitled: dict[str, set[int]] = {}
        self._by_name: dict[str, set[int]] = {}
        for document in documents:
            whole, untitled = document.forms
            if whole in every.texts:
                self._by_whole.setdefault(whole, set()).add(document.number)
            if untitled in every.nameless:
                self._by_untitled.setdefault(untitled, set()).add(document.number)
            if document.name is not None and document.name in every.names:
                self._by_name.setdefault(document.name, set()).add(document.number)

    def of(self, forms: Forms) -> set[int]:
        """Numbers of the documents that have one of these forms."""
        lists = [*(self._by_whole.get(text, ()) for text in forms.texts),
                 *(self._by_untitled.get(text, ()) for text in forms.nameless),
                 *(self._by_name.get(name, ()) for name in forms.names)]
        return set().union(*lists)
