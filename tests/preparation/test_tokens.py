"""Tokens of captions are written in order, whole, and on from where a killed process was."""

import os
from pathlib import Path

import numpy as np
import pytest
from tiny_preparations import job_of, prepare_config, write_digits

from dtr_ray.preparation import tokens as module
from dtr_ray.preparation.job import Job
from dtr_ray.preparation.tokens import Tokens

TEXTS = [[f"caption {i}", f"caption {i // 2}"] for i in range(1500)]


@pytest.fixture
def job(tmp_path: Path) -> Job:
    write_digits(tmp_path / "digits", 10, captions=True)
    job = job_of(prepare_config(tmp_path / "digits", tmp_path, text_encoder="some/clip", text_channels=3))
    job.begin()
    return job


def _encoded(tokens: Tokens, number: int) -> np.ndarray:
    values = [float(name.removeprefix("caption ") or -1) for name in tokens.chunk(number)]
    return np.broadcast_to(np.array(values, np.float16)[:, None, None], (len(values), 77, 3))


@pytest.mark.parametrize("cut_at", [0, 1, 15, 16, 20, 23])
def test_tokens_go_on_where_they_were_and_are_all_right(job: Job, cut_at: int) -> None:
    tokens = Tokens(job, TEXTS)
    assert (len(tokens.names), tokens.num_chunks) == (1501, 24)
    for number in range(cut_at):
        tokens.write(number, _encoded(tokens, number))
    # What came after the last note may be lost, or be half there.
    again = Tokens(job, TEXTS)
    assert again.num_done == cut_at // module._NOTED_EVERY * module._NOTED_EVERY
    if cut_at:
        os.truncate(job.work / "tokens.npy", (job.work / "tokens.npy").stat().st_size - 1)
    for number in range(again.num_done, again.num_chunks):
        again.write(number, _encoded(again, number))
    entry = again.close()
    found = np.load(job.folder / "tokens.npy")
    assert found.shape == (1501, 77, 3)
    assert found.nbytes + 128 == entry.num_bytes
    expected = [float(name.removeprefix("caption ") or -1) for name in again.names]
    np.testing.assert_array_equal(found[:, 0, 0], np.array(expected, np.float16))
    done = Tokens(job, TEXTS)
    assert done.num_done == done.num_chunks
    assert done.close() == entry
