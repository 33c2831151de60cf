"""What a user can get wrong: each error's text names file, line, key, value and the remedy."""


class UserError(Exception):
    """Base of errors whose text is for the user; the command line prints it on one line and exits with 2."""


class ConfigError(UserError, ValueError):
    """A setting, or a combination of settings, that cannot work."""


class DataError(UserError, ValueError):
    """A data file or row that cannot be used; the text begins with `FILE:LINE: `."""


class CheckpointError(UserError, RuntimeError):
    """A model directory or checkpoint that cannot be read, written or converted."""
