"""`completion bash|zsh`"""

import argparse
import dataclasses
from collections.abc import Iterator
from typing import Any, get_type_hints

from megatron_embed.cli.common import write_output

HELP = "Print a shell's completion of commands, options and settings"
EXAMPLES = ('eval "$(megatron-embed completion bash)"    # in ~/.bashrc',
            'eval "$(megatron-embed completion zsh)"     # in ~/.zshrc, after compinit')
PAGE = "docs/launching.md"

BASH = """_megatron_embed() {
    local current=${COMP_WORDS[COMP_CWORD]} candidates=""
    case $COMP_CWORD:${COMP_WORDS[1]} in
    1:*) candidates="COMMANDS" ;;
CASES
    esac
    COMPREPLY=($(compgen -W "$candidates" -- "$current"))
    if [[ ${COMPREPLY[0]:-} == *= ]]; then compopt -o nospace 2>/dev/null; fi
}
complete -o default -F _megatron_embed megatron-embed"""
ZSH = """_megatron_embed() {
    local -a candidates
    case $CURRENT:${words[2]} in
    2:*) candidates=(COMMANDS) ;;
CASES
    esac
    compadd -S '' -- ${(M)candidates:#*=}
    compadd -- ${candidates:#*=}
    if (( CURRENT > 2 )); then _files; fi
}
compdef _megatron_embed megatron-embed"""
SCRIPTS = {"bash": (BASH, '    *:{command}) candidates="{words}" ;;'),
           "zsh": (ZSH, "    *:{command}) candidates=({words}) ;;")}
"""By shell: the script, and its line for a command."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", choices=SCRIPTS, help="Shell that reads the output")


def run(args: argparse.Namespace) -> int:
    """Print a script that needs nothing but the shell: it holds all words of this version."""
    template, line = SCRIPTS[args.shell]
    commands = subcommands(args.parser)
    # No word needs quotes: they are names with dots, dashes and equals signs.
    cases = "\n".join(line.format(command=name, words=" ".join(dict.fromkeys(words_of(parser))))
                      for name, parser in commands.items())
    write_output(template.replace("COMMANDS", " ".join(commands)).replace("CASES", cases))
    return 0


def subcommands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """The parsers of the parser's commands, by name."""
    return {name: command for action in parser._actions if isinstance(action, argparse._SubParsersAction)
            for name, command in action.choices.items()}


def words_of(parser: argparse.ArgumentParser) -> Iterator[str]:
    """Words that may follow a command: its own commands and choices, options, and settings with their `=`."""
    for name, nested in subcommands(parser).items():
        yield name
        yield from words_of(nested)
    for action in parser._actions:
        yield from action.option_strings
        if not action.option_strings and action.choices and not isinstance(action, argparse._SubParsersAction):
            yield from map(str, action.choices)
        if action.dest == "overrides":
            prefix = "parallel." if action.metavar == "parallel.KEY=VALUE" else ""
            yield from (f"{key}=" for key in settings() if key.startswith(prefix))


def settings() -> Iterator[str]:
    """Dotted keys of a run's settings."""
    from megatron_embed.config.schema import RunConfig

    def leaves(target: Any, prefix: str) -> Iterator[str]:
        for key, annotation in get_type_hints(target).items():
            if dataclasses.is_dataclass(annotation):
                yield from leaves(annotation, f"{prefix}{key}.")
            else:
                yield f"{prefix}{key}"

    return leaves(RunConfig, "")
