"""Runs for the tests: as result.json has them, to be changed, and as directories."""

from pathlib import Path

import pytest

from tests.report.cascades import made_up_sidenet
from tests.report.runs import (
  made_up_auxiliary,
  made_up_gates,
  made_up_implosion,
  made_up_netcut,
  made_up_result,
  write_run,
)


@pytest.fixture
def result() -> dict:
  return made_up_result()


@pytest.fixture
def old_result() -> dict:
  """As it was written when there was one method."""
  result = made_up_result()
  options = result.pop('options')
  del result['method'], result['rounds']
  return result | options


@pytest.fixture
def run_directory(tmp_path: Path) -> Path:
  return write_run(tmp_path / 'run', made_up_result(), made_up_gates())


@pytest.fixture(scope='session')
def read_only_run(tmp_path_factory) -> Path:
  """The same, once for all tests that leave it as it is."""
  path = tmp_path_factory.mktemp('runs') / 'run'
  return write_run(path, made_up_result(), made_up_gates())


@pytest.fixture
def netcut() -> tuple[dict, list[dict]]:
  return made_up_netcut()


@pytest.fixture
def implosion() -> tuple[dict, list[dict]]:
  return made_up_implosion()


@pytest.fixture
def auxiliary() -> tuple[dict, list[dict]]:
  return made_up_auxiliary()


@pytest.fixture
def sidenet() -> dict:
  return made_up_sidenet()


@pytest.fixture
def sidenet_run(tmp_path: Path, sidenet) -> Path:
  return write_run(tmp_path / 'sidenet', sidenet, [])


@pytest.fixture
def netcut_run(tmp_path: Path, netcut) -> Path:
  return write_run(tmp_path / 'netcut', *netcut)


@pytest.fixture
def implosion_run(tmp_path: Path, implosion) -> Path:
  return write_run(tmp_path / 'implosion', *implosion)


@pytest.fixture
def auxiliary_run(tmp_path: Path, auxiliary) -> Path:
  return write_run(tmp_path / 'auxiliary', *auxiliary)
