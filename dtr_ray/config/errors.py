"""What is wrong with a configuration, in words for the person who wrote it."""

import difflib
import dis
from collections.abc import Iterable
from dataclasses import dataclass

Path = tuple[str | int, ...]
"""Where a value is in the tree: keys and list indices from its top."""


class ConfigError(ValueError):
    """The user's configuration is wrong; one line a problem names file, line, key, value and rule."""


def is_refusal(error: ValueError) -> bool:
    """Whether this package raised an error itself, on purpose: then its message was written for the user.

    Any other ValueError comes out of a library or a built-in function that was called wrongly, which is a
    fault of ours: its traceback is worth more than its message.
    """
    place = error.__traceback__
    if place is None:
        return False
    while place.tb_next is not None:
        place = place.tb_next
    code = place.tb_frame.f_code
    own = str(place.tb_frame.f_globals.get("__name__", "")).startswith("dtr_ray")
    return own and code.co_code[place.tb_lasti] == dis.opmap["RAISE_VARARGS"]


class ConfigWarning(UserWarning):
    """A setting that is replaced or has no effect."""


@dataclass(frozen=True)
class Problem:
    """A broken rule and the key that it is about."""

    path: Path
    rule: str
    """What is wrong and what would be right, without the key's own name."""
    also: tuple[Path, ...] = ()
    """Other keys that take part: the message points at one of them where `--set` gave it."""

    def below(self, path: Path) -> "Problem":
        """The same problem seen from the tree in which this one's top is at `path`."""
        return Problem(path + self.path, self.rule, tuple(path + other for other in self.also))


class RuleError(ValueError):
    """Raised by the validators of a section; the paths are relative to the section."""

    def __init__(self, *problems: Problem) -> None:
        super().__init__("; ".join(f"{dotted(p.path)}: {p.rule}" if p.path else p.rule for p in problems))
        self.problems = problems


def broken(key: str, rule: str, *also: str) -> RuleError:
    """A RuleError about one dotted key; `also` are the keys that it is compared with."""
    return RuleError(Problem(tuple(key.split(".")), rule, tuple(tuple(k.split(".")) for k in also)))


def dotted(path: Path) -> str:
    """A path as it is written: `search.starting_points[2].routing.alpha`."""
    parts = [f"[{part}]" if isinstance(part, int) else f".{part[:80] or repr('')}" for part in path]
    return "".join(parts).removeprefix(".")


def one_line(text: str) -> str:
    """A message without line breaks and other characters that a terminal would act on."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def near_miss(word: object, known: Iterable[str]) -> str | None:
    """The known name that `word` was probably meant to be, or None."""
    names = list(known)
    lower = {name.lower(): name for name in names}
    close = difflib.get_close_matches(str(word)[:100].lower(), lower, n=1, cutoff=0.6)
    return lower[close[0]] if close else None


def suggestion(word: object, known: Iterable[str]) -> str:
    """`did you mean X?` where there is a near miss, else the names to choose from."""
    names = list(known)
    guess = near_miss(word, names)
    guesses = [guess] if guess else [name for name in names if name.endswith(f".{word}")][:3]
    if guesses:
        return f"did you mean {' or '.join(guesses)}?"
    return "known: " + ", ".join(names) if len(names) <= 20 else f"no such name among the {len(names)} known"


def shown(value: object) -> str:
    """A value as it is shown in a message: as YAML would write it, cut where it is long."""
    if value is None:
        text = "null"
    elif isinstance(value, bool):
        text = "true" if value else "false"
    elif isinstance(value, dict):
        text = "a section with " + (", ".join(map(str, value)) or "nothing in it")
    elif isinstance(value, list):
        text = "[" + ", ".join(shown(item) for item in value[:10]) + (", ...]" if len(value) > 10 else "]")
    elif isinstance(value, str):
        text = repr(value[:80])
    else:
        text = f"{value:g}" if isinstance(value, float) and value == float(f"{value:g}") else str(value)
    return text if len(text) <= 80 else text[:77] + "..."
