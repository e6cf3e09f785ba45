import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread():
    """The networks are so small that threads only wait for each other, for seconds where other processes run too."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
