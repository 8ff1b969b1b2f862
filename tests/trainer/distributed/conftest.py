"""The files that all tests of this folder train on."""

import pytest
from layouts import Files, write_files


@pytest.fixture(scope="session")
def files(tmp_path_factory) -> Files:
    return write_files(tmp_path_factory.mktemp("tiny"))
