"""The prompts of the command line in place of the model directory's."""

import argparse
from collections.abc import Sequence

from megatron_embed.errors import ConfigError
from megatron_embed.loading.model_directory import find_model
from megatron_embed.names import Role


def given_prompts(args: argparse.Namespace, roles: Sequence[Role] = ("query", "document")) -> dict[Role, str]:
    """The prompts of --query-prompt and --document-prompt, as far as they were given.

    Args:
        args: --model, --query-prompt and --document-prompt.
        roles: the roles of the texts.
    Raises:
        ConfigError: a prompt was given for another role, or a prompt, given or the directory's, contains
            `{instruction}`, which these texts do not have.
    """
    values = {"query": args.query_prompt, "document": args.document_prompt}
    for role, value in values.items():
        if value is not None and role not in roles:
            raise ConfigError(f"--{role}-prompt {value!r}: no text here is a {role}; leave it out, or add "
                              f"--role {role}", key=f"--{role}-prompt")
    given: dict[Role, str] = {role: values[role] for role in roles if values[role] is not None}
    if "query" in roles:
        of_directory = "query" not in given
        prompt = find_model(args.model, "--model").saved.prompts.get("query", "") if of_directory else given["query"]
        if "{instruction}" in prompt:
            whose = "of the directory" if of_directory else "given"
            raise ConfigError(f"--query-prompt: the prompt {whose}, {prompt!r}, contains {{instruction}}, and the "
                              "texts have no instruction; give the prompt with the task's instruction written out",
                              key="--query-prompt")
    if "{instruction}" in given.get("document", ""):
        raise ConfigError(f"--document-prompt {given['document']!r}: documents have no instruction; write it out",
                          key="--document-prompt")
    return given


def refuse_prompts(args: argparse.Namespace, why: str) -> None:
    """Raises ConfigError for a prompt that was given without effect; `why` says why it has none."""
    for role, value in (("query", args.query_prompt), ("document", args.document_prompt)):
        if value is not None:
            raise ConfigError(f"--{role}-prompt {value!r}: {why}; leave it out", key=f"--{role}-prompt")
