"""Errors a user of fastprune can meet, the hint that goes with a misspelt name, and what others' code raises."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches


class FastpruneError(RuntimeError):
    """Base of every error of ours that is not a plain ``ValueError`` about an argument."""


class BackendError(FastpruneError):
    """A backend was asked for by name and cannot take this call."""


class GraphError(FastpruneError):
    """The channel graph cannot be built, or a shrunk model does not compute what its masked model computes."""


class ExportError(FastpruneError):
    """A model cannot be written to a file that others can run, or the file does not compute what the model does."""


class DataError(FastpruneError):
    """A data set is missing, incomplete or damaged."""


class CheckpointError(FastpruneError):
    """A checkpoint is missing, damaged, foreign, or does not fit the network it is loaded into."""


class TrainingError(FastpruneError):
    """Training cannot go on, for example because the loss is not finite."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The tail of an "unknown name" error: the nearest known name, if one is near, and all of them."""
    known = sorted(known)
    near = get_close_matches(name, known, n=1)
    return (f"; did you mean {near[0]!r}?" if near else ".") + f" Known: {', '.join(known)}"


@contextmanager
def in_a_line(what: str, hint: str = "") -> Iterator[None]:
    """Say in a line what fails: code that is not ours may raise anything.

    Errors of ours, ``ValueError`` and ``OSError`` are handed on as they are.
    """
    try:
        yield
    except (FastpruneError, ValueError, OSError):
        raise
    except Exception as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ValueError(f"{what}: {reason}{hint}") from error
