"""The errors of the package; the text of a user's error names file, line, key, value and the remedy."""


class UserError(Exception):
    """Base of errors whose text is for the user; the command line prints it on one line and exits with 2."""

    def __init__(self, message: str = "", *, key: str | None = None) -> None:
        """`key`: the setting, as `section.name`, or the option that the message is about."""
        self.key = key
        super().__init__(message)


class ConfigError(UserError, ValueError):
    """A setting, or a combination of settings, that cannot work."""


class DataError(UserError, ValueError):
    """A data file or row that cannot be used; the text begins with `FILE:LINE: `."""


class CheckpointError(UserError, RuntimeError):
    """A model directory or checkpoint that cannot be read, written or converted."""


NO_TOKENS = "has no tokens in this tokenizer, or only ones of the skip list of a multi-vector model"
"""What is wrong with a text that gives no vector."""


class EmptyTextError(UserError, ValueError):
    """A text without tokens. It carries the text's index, so that a caller can name the file and line instead."""

    def __init__(self, row: int, name: str, text: str) -> None:
        """`row`: index of the text among those that were passed, from 0; `name`: what the message calls the text."""
        self.row, self.name, self.text = row, name, text
        super().__init__(f"{name}: the text {text[:40]!r} {NO_TOKENS}; remove it, or let every text have one: by a "
                         "prompt, where a text gives one vector by a pooling that adds an EOS (lasttoken), where each "
                         "token gives one by a shorter skip list (embedding.skiplist_words of a run, skiplist_words "
                         "in the directory of MultiVectorMask)")

    def __reduce__(self) -> tuple[type["EmptyTextError"], tuple[int, str, str]]:
        """The arguments of the constructor, from which another rank rebuilds the error."""
        return type(self), (self.row, self.name, self.text)


def first_line(error: BaseException) -> str:
    """The first line of an error's text; the name of its type if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


class PreemptedError(Exception):
    """The run was asked to stop and has saved its state: not a failure. The command line exits with 75."""


class LostRankError(RuntimeError):
    """Another rank of the run is gone, so this one cannot continue; the text names it. Exit code 1."""

    def __init__(self, message: str, *, is_reporting_rank: bool) -> None:
        """`is_reporting_rank`: whether this rank prints the message for all."""
        self.is_reporting_rank = is_reporting_rank
        super().__init__(message)
