"""A YAML file as plain values that remember their lines; YAML 1.2's plain scalars, nothing executable.

Only `true` and `false` are booleans (`yes`, `no`, `on` and `off` are text), and `1e-4` is a number.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path as FilePath
from typing import Any

import yaml

from dtr_ray.config.errors import ConfigError, Path, dotted, near_miss, one_line, shown

MAX_BYTES = 2**20
MAX_DEPTH = 20
MAX_VALUES = 20_000
"""Values in a file with its aliases written out: a small file can ask for billions."""
MAX_MESSAGES = 10

_TAG = "tag:yaml.org,2002:"
_PATTERNS = {
    "null": r"(~|null|Null|NULL|)",
    "bool": r"(true|True|TRUE|false|False|FALSE)",
    "int": r"([-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)",
    "float": r"([-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))",
}


@dataclass
class Tree:
    """The values of a file, and where each came from."""

    values: Any
    origins: dict[Path, str] = field(default_factory=dict)
    """`FILE:LINE` of each key and list item, or the `--set` that gave it."""
    lines: dict[Path, int] = field(default_factory=dict)

    def nearest(self, path: Path) -> Path:
        """The path itself, or the deepest section around it that was written down."""
        while path and path not in self.origins:
            path = path[:-1]
        return path


@dataclass(frozen=True)
class Message:
    """One line for the user, and its place in the file."""

    line: int
    place: str
    """`FILE:LINE: KEY`, or as much of it as there is."""
    rule: str

    @property
    def text(self) -> str:
        """The whole line."""
        return f"{self.place}: {self.rule}"


class _RefusedError(Exception):
    """The file is not read any further."""

    def __init__(self, line: int, rule: str) -> None:
        super().__init__(rule)
        self.line = line


class _Loader(yaml.SafeLoader):
    """Composes nodes up to a depth and a number; YAML 1.2's core scalars."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0
        self._count = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        line = self.peek_event().start_mark.line + 1  # type: ignore[no-untyped-call]
        self._depth += 1
        self._count += 1
        if self._depth > MAX_DEPTH:
            raise _RefusedError(line, f"nested deeper than {MAX_DEPTH} levels")
        if self._count > MAX_VALUES:
            raise _RefusedError(line, f"more than {MAX_VALUES} values")
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node


for _name, _pattern in _PATTERNS.items():
    _Loader.add_implicit_resolver(_TAG + _name, re.compile(_pattern + r"\Z"), None)


def read_tree(path: FilePath) -> Tree:
    """Reads a YAML file; raises ConfigError that names the file, the line and what is wrong."""
    tree, messages = _parse(_text(path), str(path))
    fail(messages)
    if tree.values is None:
        raise ConfigError(f"{path}: the file is empty")
    if not isinstance(tree.values, dict):
        given = shown(tree.values)
        raise ConfigError(f"{tree.origins[()]}: expected keys with values at the top, got {given}")
    return tree


def parse_value(text: str, source: str) -> Any:
    """A value as YAML would read it; `source` begins the message of a ConfigError."""
    tree, messages = _parse(text, "")
    if messages:
        raise ConfigError(f"{source}: {messages[0].rule}")
    return tree.values


def fail(messages: list[Message]) -> None:
    """Raises the ConfigError of these messages in the order of their lines, if there are any."""
    if not messages:
        return
    texts = list(dict.fromkeys(one_line(m.text) for m in sorted(messages, key=lambda m: m.line)))
    if len(texts) > MAX_MESSAGES:
        texts[MAX_MESSAGES:] = [f"and {len(texts) - MAX_MESSAGES} more problems"]
    raise ConfigError("\n".join(texts))


def _text(path: FilePath) -> str:
    try:
        content = _content(path)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ConfigError(f"{path}: {reason}") from None
    if len(content) > MAX_BYTES:
        raise ConfigError(f"{path}: is larger than {MAX_BYTES} bytes: not a configuration file")
    if b"\0" in content and content[:2] not in (b"\xff\xfe", b"\xfe\xff"):
        line = content[: content.index(b"\0")].count(b"\n") + 1
        raise ConfigError(f"{path}:{line}: is a binary file, expected YAML text in UTF-8")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise ConfigError(f"{path}:{line}: is not UTF-8 text: byte 0x{content[error.start]:02x}") from None


def _content(path: FilePath) -> bytes:
    """At most one byte more than allowed; raises OSError or ValueError with the reason."""
    if path.is_dir():
        raise ValueError("is a folder, expected a YAML file")
    if not path.exists():
        raise ValueError(f"no such file{_sibling(path)}")
    if not path.is_file():
        raise ValueError("is not a regular file, expected a YAML file")
    with path.open("rb") as file:
        return file.read(MAX_BYTES + 1)


def _sibling(path: FilePath) -> str:
    if not path.parent.is_dir():
        return f" (nor is there a folder {path.parent})"
    names = sorted(p.name for p in path.parent.iterdir() if p.suffix in (".yaml", ".yml", ".json"))[:1000]
    guess = near_miss(path.name, names)
    return f"; did you mean {path.parent / guess}?" if guess else ""


def _parse(text: str, source: str) -> tuple[Tree, list[Message]]:
    """Values with their lines, and what is wrong with them; `source` is the file's name."""
    builder = _Builder(source)
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is not None:
            builder.tree.lines[()] = node.start_mark.line + 1
            builder.tree.origins[()] = f"{source}:{node.start_mark.line + 1}"
            builder.tree.values = builder.build(node, ())
    except _RefusedError as refused:
        builder.note(refused.line, (), str(refused))
    except yaml.MarkedYAMLError as error:
        builder.note(*_syntax(error))
    except yaml.reader.ReaderError as error:
        line = text[: error.position].count("\n") + 1
        builder.note(line, (), f"character U+{int(error.character):04X} is not allowed in YAML text")
    return builder.tree, builder.messages


def _syntax(error: yaml.MarkedYAMLError) -> tuple[int, Path, str]:
    mark = error.problem_mark or error.context_mark
    line, column = (mark.line + 1, mark.column + 1) if mark else (1, 1)
    problem = error.problem or "cannot be read"
    if "found another document" in problem:
        return line, (), "a second document (---) begins: a file holds one"
    text = f"column {column}: not valid YAML: {problem}"
    if r"'\t'" in problem:
        text += " (a tab: use spaces)"
    begun = error.context_mark
    if begun and begun.line + 1 < line:
        text += f" ({error.context} that begins at line {begun.line + 1})"
    return line, (), text


class _Builder:
    """Turns nodes into plain values; what is wrong is collected in `messages`."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.tree = Tree(None)
        self.messages: list[Message] = []
        self._open: set[int] = set()
        self._count = 0

    def note(self, line: int, path: Path, rule: str) -> None:
        """Collects what is wrong at a line."""
        key = f": {dotted(path)}" if path else ""
        self.messages.append(Message(line, f"{self.source}:{line}{key}", rule))

    def build(self, node: yaml.Node, path: Path) -> Any:
        """The value of a node, its children's lines noted."""
        line = node.start_mark.line + 1
        self._count += 1
        if self._count > MAX_VALUES:
            raise _RefusedError(line, f"more than {MAX_VALUES} values once its aliases (*) are written out")
        if id(node) in self._open:
            raise _RefusedError(line, "an alias (*) refers to a value that holds it")
        if len(path) > MAX_DEPTH:
            raise _RefusedError(line, f"nested deeper than {MAX_DEPTH} levels")
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node, path)
        if node.tag not in (f"{_TAG}map", f"{_TAG}seq"):
            self.note(line, path, f"the tag {_tag(node)} is not allowed: plain values only")
            return None
        self._open.add(id(node))
        pairs = self._items(node, path) if isinstance(node, yaml.MappingNode) else enumerate(node.value)
        values: dict[Any, Any] = {}
        for key, child in pairs:
            if isinstance(key, int):
                self._place((*path, key), child)
            values[key] = self.build(child, (*path, key))
        self._open.remove(id(node))
        return values if isinstance(node, yaml.MappingNode) else list(values.values())

    def _place(self, path: Path, node: yaml.Node) -> None:
        line = node.start_mark.line + 1
        self.tree.lines[path] = line
        self.tree.origins[path] = f"{self.source}:{line}"

    def _items(self, node: yaml.MappingNode, path: Path) -> Iterator[tuple[str, yaml.Node]]:
        seen: dict[str, int] = {}
        for key_node, child in node.value:
            line = key_node.start_mark.line + 1
            key = self._scalar(key_node, path) if isinstance(key_node, yaml.ScalarNode) else None
            if not isinstance(key, str):
                plain = isinstance(key_node, yaml.ScalarNode)
                text = str(key_node.value)[:80] or "nothing"
                given = f"{text}: put it in quotes" if plain else "a list or section"
                self.note(line, path, f"a key must be text, got {given}")
            elif key in seen:
                self.note(line, (*path, key), f"the key is there twice; the first is at line {seen[key]}")
            else:
                seen[key] = line
                self._place((*path, key), key_node)
                yield key, child

    def _scalar(self, node: yaml.ScalarNode, path: Path) -> Any:
        line, text, kind = node.start_mark.line + 1, str(node.value), node.tag.removeprefix(_TAG)
        if kind == "str":
            return text
        if kind not in _PATTERNS or not re.fullmatch(_PATTERNS[kind], text):
            self.note(line, path, f"the tag {_tag(node)} is not allowed for {shown(text)}: plain values only")
            return None
        if kind in ("null", "bool"):
            return text.lower() == "true" if kind == "bool" else None
        if kind == "int":
            number = int(text, 0) if text[:2] in ("0o", "0x") else int(text) if len(text) <= 40 else 2**64
            if abs(number) < 2**63:
                return number
            self.note(line, path, f"{text[:40]} does not fit 64 bits")
            return None
        value = math.nan if "n" in text.lower() else float(text)
        if not math.isfinite(value):
            self.note(line, path, f"{text} is not a finite number")
        return value


def _tag(node: yaml.Node) -> str:
    return node.tag.replace(_TAG, "!!")
