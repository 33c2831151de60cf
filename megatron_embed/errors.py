"""What a user can get wrong: each error's text names file, line, key, value and the remedy. And how else runs end."""


class UserError(Exception):
    """Base of errors whose text is for the user; the command line prints it on one line and exits with 2."""


class ConfigError(UserError, ValueError):
    """A setting, or a combination of settings, that cannot work."""


class DataError(UserError, ValueError):
    """A data file or row that cannot be used; the text begins with `FILE:LINE: `."""


class CheckpointError(UserError, RuntimeError):
    """A model directory or checkpoint that cannot be read, written or converted."""


class EmptyTextError(UserError, ValueError):
    """A text that the tokenizer turns into nothing; whoever knows where the text came from says that instead."""

    def __init__(self, row: int, place: str, text: str) -> None:
        """`row`: number of the text, from 0, among those handed over; `place`: how to call it in the message."""
        self.row, self.place, self.text = row, place, text
        super().__init__(f"{place}: the text {text[:40]!r} has no tokens in this tokenizer; remove it, or choose a "
                         "pooling that adds an EOS (lasttoken)")

    def __reduce__(self) -> tuple[type["EmptyTextError"], tuple[int, str, str]]:
        """For the way to another rank."""
        return type(self), (self.row, self.place, self.text)


class PreemptedError(Exception):
    """The run was asked to stop and has saved its state: not a failure. The command line exits with 75."""


class LostRankError(RuntimeError):
    """Another rank of the run is gone, so this one cannot go on; the text names it. Exit code 1."""

    def __init__(self, message: str, *, is_reporting_rank: bool) -> None:
        """`is_reporting_rank`: whether this rank prints the message for all."""
        self.is_reporting_rank = is_reporting_rank
        super().__init__(message)
