"""What all tests share: hypothesis's settings, and a random state and thread count that no test inherits from another."""

from collections.abc import Iterator

import hypothesis
import pytest
import torch

# The same examples on every machine and in every run, so that a failure seen once can be seen again. No deadline: shared
# machines stall.
hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None, print_blob=True)
hypothesis.settings.load_profile("repeatable")


@pytest.fixture(autouse=True)
def isolated() -> Iterator[None]:
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # small tensors on a busy machine: more threads would only wait for one another
    yield
    torch.set_num_threads(threads)
