"""What a recipe refuses, and how it speaks: the names it gives to settings, and where lines go.

A recipe is called from Python and by the command line. Its sentences name a setting as the caller
wrote it, so both read what they can act on.
"""

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass


class UsageError(ValueError):
    """A setting, or a config file, asks for what does not exist or cannot be combined."""


class Failure(RuntimeError):
    """What was asked for was understood and could not be carried out."""


def _as_argument(name: str, value: object = None) -> str:
    return name if value is None else f"{name}={value!r}"


def as_option(name: str, value: object = None) -> str:
    """How the command line spells a setting: ``--max-length``, ``--resume auto``."""
    spelt = "--" + name.replace("_", "-")
    return spelt if value is None or value is True else f"{spelt} {value}"


def _print(line: str) -> None:
    print(line, flush=True)  # what comes next may take a while


@dataclass(frozen=True)
class _Voice:
    name: Callable[..., str] = _as_argument
    say: Callable[[str], None] | None = _print


_voice: ContextVar[_Voice] = ContextVar("bigkernel.recipes.voice", default=_Voice())  # noqa: B039


def option(name: str, value: object = None) -> str:
    """How a setting is named in a sentence: ``max_length``, ``resume='auto'``, or as an option."""
    return _voice.get().name(name, value)


def say(line: str) -> None:
    """Tell how the run goes on: on stdout, or nowhere inside ``quietly``."""
    speak = _voice.get().say
    if speak is not None:
        speak(line)


def is_quiet() -> bool:
    """Whether lines go nowhere."""
    return _voice.get().say is None


@contextlib.contextmanager
def _speaking(voice: _Voice) -> Iterator[None]:
    before = _voice.set(voice)
    try:
        yield
    finally:
        _voice.reset(before)


def speaking_of_options() -> contextlib.AbstractContextManager[None]:
    """Inside, settings are called as the command line spells them."""
    return _speaking(_Voice(as_option, _voice.get().say))


def quietly() -> contextlib.AbstractContextManager[None]:
    """Inside, a recipe says nothing but what it raises."""
    return _speaking(_Voice(_voice.get().name, None))
