"""The words of shell commands: quotes, line continuations, comments, variables that the text itself sets."""

import re
from collections.abc import Iterator

from megatron_embed.errors import ConfigError

_PIECE = re.compile(r"""
    (?P<continued>\\[ \t]*(?:\#[^\n]*)?\r?\n)      # `\` at the end of a line; what some write behind it is a comment
  | (?P<space>[ \t\r]+)
  | (?P<end>\n|;|&&|\|\||\||&)
  | (?P<single>'[^']*')
  | (?P<double>"(?:\\.|[^"\\])*")
  | (?P<escaped>\\.)
  | (?P<hash>\#)
  | (?P<variable>\$(?:\{[^}]*\}|\w+))
  | (?P<plain>[^\s'"\\;&|\#$]+|\$)
""", re.VERBOSE | re.DOTALL)
_VARIABLE = re.compile(r"\$(?:\{(\w+)(?::?[-=]([^}]*))?\}|(\w+))")
_ARRAY = re.compile(r"(?ms)^[ \t]*(\w+)=\((.*?)\)[ \t]*$")
_ARGUMENTS = re.compile(r"\$(?:[@*]|\{[@*][^}]*\})")
"""What stands for the arguments of a script, of which it knows none."""
_KEYWORDS = ("then", "do", "else", "if", "fi", "done", "{", "}", "(", ")", "!", "set")
ASSIGNMENT = re.compile(r"([A-Za-z_]\w*)=(.*)", re.DOTALL)


def commands_of(text: str) -> tuple[list[list[str]], dict[str, str]]:
    """The commands of a text of shell, as words each, and the variables that it sets by themselves or exports.

    A variable that the text sets is replaced by its value, `${NAME:-value}` by its default; others stay as written.

    Raises:
        ConfigError: a quote is not closed.
    """
    variables: dict[str, str] = {}
    commands = []
    for words in _split(_with_arrays(text), variables):
        words = [word for word in words if not _ARGUMENTS.fullmatch(word)]
        while words and words[0] in _KEYWORDS:
            words = words[1:]
        names = [ASSIGNMENT.fullmatch(word) for word in words if word not in ("export", "declare")]
        if words and words[0] == "eval":
            commands += commands_of(" ".join(words[1:]))[0]
        elif all(names) or words[0] in ("export", "declare"):
            variables |= {name[1]: name[2] for name in names if name}
        else:
            commands.append(words)
    return commands, variables


def _with_arrays(text: str) -> str:
    """The text with `${NAME[@]}` replaced by what `NAME=(...)` holds, on one line."""
    arrays = {name: " ".join(re.sub(r"(?m)(^|\s)#.*$|\\$", " ", inner).split("\n"))
              for name, inner in _ARRAY.findall(text)}
    text = _ARRAY.sub("\n", text)
    return re.sub(r'"?\$\{(\w+)\[[@*]\]\}"?', lambda match: arrays.get(match[1], match[0]), text)


def _split(text: str, variables: dict[str, str]) -> Iterator[list[str]]:
    """The words of each command, with the variables that are known when it is reached."""
    words: list[str] = []
    word: str | None = None
    position = 0
    while position < len(text):
        piece = _PIECE.match(text, position)
        if piece is None:
            raise ConfigError(f"--from: a quote is not closed behind {text[max(0, position - 30):position + 10]!r}")
        position = piece.end()
        kind, value = piece.lastgroup, piece[0]
        if kind == "hash" and word is None:
            end = text.find("\n", position)
            position = len(text) if end < 0 else end
        elif kind in ("space", "continued", "end"):
            if word is not None:
                words.append(word)
                word = None
            if kind == "end" and words:
                yield words
                words = []
        elif kind == "variable" and len(parts := _expanded(value, variables).split()) > 1:
            words += [(word or "") + parts[0], *parts[1:-1]]
            word = parts[-1]
        else:
            word = (word or "") + _unquoted(str(kind), value, variables)
    if word is not None:
        words.append(word)
    if words:
        yield words


def _unquoted(kind: str, value: str, variables: dict[str, str]) -> str:
    """A piece of a word without its quotes, with the values of variables."""
    if kind == "single":
        return value[1:-1]
    if kind == "double":
        return re.sub(r'\\(["\\$`\n])', lambda match: match[1].strip("\n"), _expanded(value[1:-1], variables))
    if kind == "escaped":
        return value[1:]
    return _expanded(value, variables) if kind == "variable" else value


def _expanded(text: str, variables: dict[str, str]) -> str:
    def value(match: re.Match[str]) -> str:
        name, default = match[1] or match[3], match[2]
        return variables.get(name, match[0] if default is None else default)

    return _VARIABLE.sub(value, text)
