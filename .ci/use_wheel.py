"""Check an installed wheel: it is the one imported, has its types and version, and runs the README's code.

Run by `make check-wheel` with the Python of a fresh environment; imports nothing but the library and the standard one.
"""

import importlib.metadata
import importlib.util
import re
import sys
from pathlib import Path

import fisherfn as ff

ROOT = Path(__file__).resolve().parents[1]
package = Path(ff.__file__).resolve().parent

assert package.is_relative_to(sys.prefix) and (package / "py.typed").is_file(), package
assert importlib.metadata.version("fisherfn") == ff.__version__
for absent in ("scipy", "sklearn", "matplotlib", "common", "tests"):
    assert importlib.util.find_spec(absent) is None, f"{absent} is installed: the environment is not a bare one"

code = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S)
assert code, "README.md shows no code"
for block in code:
    exec(block)

try:
    ng.fisher(ng.stats(params, (x, y), generator=rng)).to_scipy()  # noqa: F821 - the README's names
except ff.errors.MissingPackageError as error:
    print(f"without scipy: {error}")
print(f"fisherfn {ff.__version__} from {package}: the README's code runs")
