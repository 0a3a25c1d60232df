"""Common settings of all tests: Hypothesis profiles, and torch on one thread."""

import os

import pytest
import torch
from hypothesis import HealthCheck, settings

# A deadline would measure the machine. Derandomized, so that a failure belongs to the change that shows it; the deep
# profile draws anew each time and is for hunting.
QUIET = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
settings.register_profile("quick", max_examples=25, deadline=None, derandomize=True, suppress_health_check=QUIET)
settings.register_profile("deep", max_examples=500, deadline=None, suppress_health_check=QUIET)
settings.load_profile(os.environ.get("FISHERFN_HYPOTHESIS", "quick"))

torch.set_num_threads(1)

pytest_plugins = ["tests.typed"]


@pytest.fixture(autouse=True)
def untouched_torch_globals():
    """Each test starts from the same global generator; default dtype and grad mode are the caller's, and stay so."""
    torch.manual_seed(0)
    before = torch.get_default_dtype(), torch.is_grad_enabled()
    yield
    after = torch.get_default_dtype(), torch.is_grad_enabled()
    torch.set_default_dtype(before[0])
    assert after == before, "a test or the code under test changed torch's default dtype or grad mode"
