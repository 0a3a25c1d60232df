"""Processes of the apps without the seconds that Python takes to import torch: copies of the test's own process.

`Forked` is `subprocess.Popen` for a script of Python: pipes, signals, exit codes and limits are those of any
process. The copy begins with torch and the library imported and with nothing of the apps.
"""

import faulthandler
import importlib
import os
import runpy
import signal
import subprocess
import sys
import traceback
import warnings
from pathlib import Path

APPS = Path(__file__).parents[1] / "apps"
LATE = ("torch._dynamo", "matplotlib.pyplot", "scipy.io", "sklearn.datasets")
"""Modules that a run imports after its start, each in a second or more: imported before the first copy is made."""


class Forked(subprocess.Popen):
    """A process that runs Python on a script, or on a text after `-c`, in a copy of this one; others are started."""

    def _execute_child(self, args, executable, preexec_fn, close_fds, pass_fds, cwd, env, *more):
        ends = more[3], more[6], more[8]  # of pipes, the child's; -1 for a stream of this process
        plain = isinstance(args, (str, bytes, os.PathLike)) or args[0] != sys.executable
        if plain or not (str(args[1]) == "-c" or str(args[1]).endswith(".py")):
            return super()._execute_child(args, executable, preexec_fn, close_fds, pass_fds, cwd, env, *more)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of imports, and where copies are made of several threads
            for name in LATE:
                importlib.import_module(name)
            self.pid = os.fork()
        if self.pid == 0:
            code = 1
            try:
                code = child([os.fspath(arg) for arg in args[1:]], ends, preexec_fn, cwd, env)
            finally:
                os._exit(code)
        self._child_created = True
        self._close_pipe_fds(*more[3:9])


def child(args, ends, preexec_fn, cwd, env) -> int:
    """Run the script as a new interpreter would; return the exit code."""
    for number, end in enumerate(ends):
        if end != -1:
            os.dup2(end, number)
    os.closerange(3, 4096)
    faulthandler.disable()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if preexec_fn is not None:
        preexec_fn()
    os.chdir(cwd or ".")
    if env is not None:
        os.environ.clear()
        os.environ.update(env)
    sys.stdin = open(0, closefd=False)
    sys.stdout = open(1, "w", closefd=False)
    sys.stderr = open(2, "w", buffering=1, closefd=False, errors="backslashreplace")
    warnings.resetwarnings()
    for category in (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning):
        warnings.simplefilter("ignore", category)
    forget_apps()
    try:
        if args[0] == "-c":
            sys.argv = ["-c", *args[2:]]
            exec(args[1], {"__name__": "__main__"})
        else:
            sys.argv, sys.path[0] = args, str(Path(args[0]).parent)
            runpy.run_path(args[0], run_name="__main__")
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 0 if error.code is None else 1
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def forget_apps() -> None:
    """Forget modules of the apps and of tests, which a test may have changed."""
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None) or ""
        if name == "own" or file.startswith(str(APPS)):
            del sys.modules[name]
