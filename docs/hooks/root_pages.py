"""The changelog and the guide for contributors stand at the root of the repository, and in the site as pages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

_PAGES = {"CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}


def on_files(files: Files, config: Any, **_: Any) -> Files:
    """Add them; their links into docs/ are then links between neighbours."""
    root = Path(config["config_file_path"]).parent
    for source, page in _PAGES.items():
        text = (root / source).read_text(encoding="utf-8").replace("](docs/", "](")
        files.append(File.generated(config, page, content=text))
    return files
