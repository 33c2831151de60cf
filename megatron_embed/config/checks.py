"""The function that every rule of a setting is checked with."""

from megatron_embed.errors import ConfigError


def require(condition: bool, key: str, value: object, rule: str) -> None:
    """Raises ConfigError that names the key, its value and the rule, unless `condition` holds."""
    if not condition:
        raise ConfigError(f"{key} = {value!r}: {rule}", key=key)
