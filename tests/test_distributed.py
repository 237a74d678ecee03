"""Who starts together: what the environment says, read strictly."""

import numpy as np
import pytest

from depthprune import distributed
from depthprune.distributed import HostError, explicit, several

MINE = {
  'JAX_COORDINATOR_ADDRESS': '10.0.0.1:1234',
  'JAX_NUM_PROCESSES': '12',
  'JAX_PROCESS_ID': '9',
}


@pytest.mark.parametrize(
  ('environment', 'found'),
  [
    ({}, False),
    (MINE, True),
    ({'JAX_PROCESS_ID': '1'}, True),
    ({'SLURM_NTASKS': '4'}, False),
    ({'SLURM_NTASKS': '4', 'SLURM_STEP_NODELIST': 'node[1-4]'}, True),
    ({'SLURM_NTASKS': '1', 'SLURM_STEP_NODELIST': 'node1'}, False),
    ({'OMPI_COMM_WORLD_SIZE': '2'}, True),
    ({'KUBERNETES_SERVICE_HOST': '10.0.0.1'}, False),
    ({'JOB_COMPLETION_INDEX': '0'}, False),
    ({'TPU_WORKER_HOSTNAMES': 'a,b'}, True),
    ({'TPU_WORKER_HOSTNAMES': 'localhost'}, False),
  ],
)
def test_one_process_alone_waits_for_nobody(environment, found):
  assert several(environment) == found


def test_a_job_of_kubernetes_is_joined_where_jax_can(monkeypatch):
  monkeypatch.setattr(
    distributed, '_installed', lambda package: package == 'kubernetes'
  )
  assert several({'JOB_COMPLETION_INDEX': '0'})
  assert not several({'KUBERNETES_SERVICE_HOST': '10.0.0.1'})


def test_a_tpu_asks_who_else_there_is_but_not_where_it_is_told_not_to(monkeypatch):
  monkeypatch.setattr(distributed, '_installed', lambda package: package == 'libtpu')
  monkeypatch.setattr(distributed.Path, 'exists', lambda path: True)
  assert several({})
  assert not several({'TPU_SKIP_MDS_QUERY': '1'})
  assert not several({'JAX_PLATFORMS': 'cpu'})


def test_what_is_said_by_hand_is_passed_on():
  assert explicit({}) == explicit({'SLURM_NTASKS': '4'}) == {}
  assert explicit(MINE) == {
    'coordinator_address': '10.0.0.1:1234',
    'num_processes': 12,
    'process_id': 9,
  }


@pytest.mark.parametrize(
  'change',
  [
    {'JAX_PROCESS_ID': None},
    {'JAX_COORDINATOR_ADDRESS': None},
    {'JAX_NUM_PROCESSES': 'two'},
    {'JAX_PROCESS_ID': '12'},
    {'JAX_PROCESS_ID': '-1'},
  ],
)
def test_half_of_it_is_refused(change):
  given = {k: v for k, v in {**MINE, **change}.items() if v is not None}
  with pytest.raises(HostError, match='expected JAX_COORDINATOR_ADDRESS=HOST:PORT'):
    explicit(given)


def test_one_process_agrees_with_itself():
  tree = {'kept': np.array([True, False]), 'none': {}}
  assert distributed.agreed(tree) is tree
  assert distributed.gathered({'a': 1}) == [{'a': 1}]
  distributed.alike('config', {'a': 1}, 'nothing')
  assert distributed.together(lambda: 3) == 3
  with pytest.raises(KeyError):
    distributed.together(lambda: {}['gone'])
