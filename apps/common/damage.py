"""Files of a result whose content is not what a program wrote there: one typed error, which names the file."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import yaml

from fisherfn.errors import FisherfnError


@contextlib.contextmanager
def understood(path: Path, error: type[FisherfnError]) -> Iterator[None]:
    """Raise `error` if the code inside, which reads the content of a file, meets a missing or malformed part."""
    try:
        yield
    except FisherfnError:
        raise
    except (KeyError, IndexError, TypeError, AttributeError, ValueError, RecursionError, yaml.YAMLError) as cause:
        raise error(f"{path} is damaged, or another version wrote it: start again with --overwrite") from cause
