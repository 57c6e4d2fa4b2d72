"""Settings every test shares; set before transformers is imported anywhere."""

import os

import pytest
import torch

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Results must not depend on how many cores are free."""
    torch.set_num_threads(1)
