from pathlib import Path

import pytest
import torch
from tiny_trials import communicate, in_workers

from dtr_ray.distributed import Group

CPU = torch.device("cpu")


def test_without_torch_distributed_the_group_is_one_process():
    assert Group.current() == Group(rank=0, world_size=1)
    assert Group.current().is_main


def test_one_process_communicates_with_itself():
    group, rows = Group(), torch.arange(6.0)
    assert torch.equal(group.slice(rows), rows)
    assert group.mean_(rows) is rows
    assert group.any(True, CPU)
    assert not group.any(False, CPU)
    assert group.gather_interleaved(rows, 6) is rows
    assert group.from_main("value") == "value"


@pytest.mark.parametrize("world_size", [1, 2, 3, 6])
def test_slices_are_the_batch_in_order(world_size: int):
    batch = torch.arange(24).view(12, 2)
    parts = [Group(rank, world_size).slice(batch) for rank in range(world_size)]
    assert torch.equal(torch.cat(parts), batch)


def test_a_batch_that_cannot_be_shared_evenly_is_refused():
    with pytest.raises(ValueError, match=r"batch of 10 .* 3 workers"):
        Group(0, 3).slice(torch.arange(10))


@pytest.mark.parametrize("world_size", [2, 3])
def test_workers_communicate(world_size: int, tmp_path: Path):
    results = in_workers(communicate, world_size, tmp_path)
    for rank, found in enumerate(results):
        assert found["is_main"] == (rank == 0)
        size = 12 // world_size
        assert found["slice"].tolist() == list(range(rank * size, (rank + 1) * size))
        assert found["mean"].item() == (1 + world_size) / 2
        assert found["any_last"]
        assert not found["any_none"]
        assert found["gathered"].tolist() == [[i, i] for i in range(7)]
        assert found["pictures"].tolist() == [[9, 9, 9]]
        assert found["from_main"] == {"rank": 0}
