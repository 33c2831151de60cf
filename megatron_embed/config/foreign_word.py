"""One setting of other trainers and what it is here; foreign_table.py holds them all."""

from typing import NamedTuple

_PEERS = {"H": "Transformers", "S": "ms-swift", "F": "FlagEmbedding", "T": "Tevatron", "B": "Sentence Transformers",
          "D": "DeepSpeed", "M": "Megatron-LM"}


OFF_ANYWAY = "off, as it always is here"
"""Why a value that leaves a feature off, which is not supported, changes nothing."""
_OFF = ("false", "no", "none", "null", "off", "n", "f", "")
_OFF_IS_A_CHOICE = frozenset((
    "share_encoder", "init_weights", "init_lora_weights", "freeze_vit", "freeze_aligner", "freeze_trainable_layers",
    "layers_to_transform", "start_layer", "compress_layers", "cutoff_layers", "head_type", "ce_score_margin",
    "rope_scaling", "decoder_first_pipeline_num_layers", "decoder_last_pipeline_num_layers"))
"""Settings that ask for something by 0 or false too."""


def is_off(name: str, value: object) -> bool:
    """Whether a setting's value only leaves a feature off, as `push_to_hub: false` does."""
    if name.rpartition(".")[2].lstrip("-") in _OFF_IS_A_CHOICE:
        return False
    return not value if isinstance(value, int | float | list | dict) else str(value).strip().lower() in _OFF


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

    def answer(self, written: str, value: object = True) -> str:
        """One sentence about the setting, which stands there as `written`.

        Args:
            value: the setting's value, where it is known.
        """
        if self.keys:
            first = f"{written} is {' and '.join(self.keys)} here"
            return f"{first}: {self.note}" if self.note else first
        if not self.supported and is_off(written, value):
            return f"{written} is not needed: {OFF_ANYWAY}; remove it"
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
