"""One setting of other trainers and what it is here; foreign_table.py holds them all."""

from typing import NamedTuple

_PEERS = {"H": "Transformers", "S": "ms-swift", "F": "FlagEmbedding", "T": "Tevatron", "B": "Sentence Transformers",
          "D": "DeepSpeed", "M": "Megatron-LM"}


class ForeignWord(NamedTuple):
    """One setting of other trainers, under all of its names."""

    names: tuple[str, ...]
    """Lower case with underscores; `section.name` where the name alone is ambiguous. The first one identifies it."""
    peers: tuple[str, ...]
    """Trainers that have it."""
    keys: tuple[str, ...]
    """Keys here; empty: there is none."""
    supported: bool
    """False: what it does is not possible here. True without keys: it is not needed."""
    note: str
    """What differs, why it is not needed, or what to do instead."""

    @property
    def name(self) -> str:
        """The first of its names."""
        return self.names[0]

    def answer(self, written: str) -> str:
        """One sentence about the setting, which stands there as `written`."""
        if self.keys:
            first = f"{written} is {' and '.join(self.keys)} here"
            return f"{first}: {self.note}" if self.note else first
        return f"{written} is {'not needed' if self.supported else 'not supported'}: {self.note}"


def key(names: str, peers: str, keys: str, note: str = "") -> ForeignWord:
    """A setting that is one of ours, or several; `names` and `keys` are separated by blanks."""
    return ForeignWord(tuple(names.split()), _peers(peers), tuple(keys.split()), True, note)


def unneeded(names: str, peers: str, because: str) -> ForeignWord:
    """A setting that nothing here needs."""
    return ForeignWord(tuple(names.split()), _peers(peers), (), True, because)


def unsupported(names: str, peers: str, instead: str) -> ForeignWord:
    """A setting that has no counterpart."""
    return ForeignWord(tuple(names.split()), _peers(peers), (), False, instead)


def _peers(letters: str) -> tuple[str, ...]:
    return tuple(_PEERS[letter] for letter in letters)
