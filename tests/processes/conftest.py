from collections.abc import Iterator

import pytest

from tests.processes.ranks import Ranks


@pytest.fixture(scope="session")
def two_processes() -> Iterator[Ranks]:
    ranks = Ranks(2)
    yield ranks
    ranks.close()


@pytest.fixture(scope="session")
def four_processes() -> Iterator[Ranks]:
    ranks = Ranks(4)
    yield ranks
    ranks.close()
