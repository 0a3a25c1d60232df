"""Whatever is passed to a public function by mistake, the error is one of the library's."""

import subprocess
import sys
from pathlib import Path

from tests import borders


def test_the_page_counts_the_cases():
    page = (Path(__file__).parents[1] / "docs" / "reliability.md").read_text(encoding="utf-8")
    assert f"passes {len(borders.CASES)} invalid arguments" in page and f"All {len(borders.CASES)} raise" in page


def test_invalid_arguments_raise_typed_errors():
    program = Path(__file__).with_name("borders.py")
    done = subprocess.run([sys.executable, program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
