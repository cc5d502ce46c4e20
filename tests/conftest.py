"""What all tests share: hypothesis's settings, their order, a random state and thread count that none inherits."""

import hypothesis
import pytest
import torch

# The same examples on every machine and in every run, so that a failure seen once can be seen again. No deadline: shared
# machines stall.
hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None, print_blob=True)
hypothesis.settings.load_profile("repeatable")


SLOWEST = ("test_cpp_example.py", "test_ways_out.py", "test_widths.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes longest comes first, so that no process is still at it when the others have nothing left to do."""
    items.sort(key=lambda item: item.path.name not in SLOWEST)


@pytest.fixture(autouse=True)
def isolated() -> None:
    torch.manual_seed(0)
    # a test that wants more asks for them: with the many small ops of reference models, threads on a busy machine would spend
    # minutes waiting for one another
    torch.set_num_threads(1)
