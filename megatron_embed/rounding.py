"""Rounding of sizes to multiples, by the standard library alone."""


def round_up(size: int, multiple: int) -> int:
    """The smallest multiple that is not below `size`."""
    return -(-size // multiple) * multiple
