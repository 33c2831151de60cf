"""The prompts that `encode`, `evaluate` and `mine` put before texts: given ones in place of the directory's."""

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from megatron_embed.errors import ConfigError

if TYPE_CHECKING:
    from megatron_embed.names import Role


def add_prompt_arguments(parser: argparse.ArgumentParser, about_queries: str = "") -> None:
    """`about_queries`: what the help says beside the default."""
    parser.add_argument("--query-prompt", metavar="TEXT",
                        help=f"before every query; {about_queries}default: the directory's")
    parser.add_argument("--document-prompt", metavar="TEXT", help="before every document; default: the directory's")


def given_prompts(args: argparse.Namespace, roles: "Sequence[Role]" = ("query", "document")) -> "dict[Role, str]":
    """The prompts that were given.

    Args:
        roles: those of the texts at hand.
    Raises:
        ConfigError: one was given for another role, or the query's, given or the directory's, has a place for an
            instruction, which these texts do not carry.
    """
    from megatron_embed.loading.model_directory import find_model

    values = {"query": args.query_prompt, "document": args.document_prompt}
    for role, value in values.items():
        if value is not None and role not in roles:
            raise ConfigError(f"--{role}-prompt {value!r}: no text here is a {role}; leave it out, or add "
                              f"--role {role}")
    found: dict[Role, str] = {role: values[role] for role in roles if values[role] is not None}
    if "query" in roles:
        of_directory = "query" not in found
        prompt = find_model(args.model, "--model").saved.prompts.get("query", "") if of_directory else found["query"]
        if "{instruction}" in prompt:
            whose = "of the directory" if of_directory else "given"
            raise ConfigError(f"--query-prompt: the prompt {whose}, {prompt!r}, has a place for an instruction, and "
                              "the texts carry none; give the prompt with the task's instruction written out")
    if "{instruction}" in found.get("document", ""):
        raise ConfigError(f"--document-prompt {found['document']!r}: documents have no instruction; write it out")
    return found


def refuse_prompts(args: argparse.Namespace, why: str) -> None:
    """Raises ConfigError for a prompt that was given and that nobody reads."""
    for role, value in (("query", args.query_prompt), ("document", args.document_prompt)):
        if value is not None:
            raise ConfigError(f"--{role}-prompt {value!r}: {why}; leave it out")
