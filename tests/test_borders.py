"""Whatever is passed to a public function by mistake, the error is one of the library's."""

import subprocess
import sys
from pathlib import Path


def test_invalid_arguments_raise_typed_errors():
    program = Path(__file__).with_name("borders.py")
    done = subprocess.run([sys.executable, program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
