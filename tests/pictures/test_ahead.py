"""Batches are read in their order, a few ahead of what is asked for, and an error is the reader's own."""

import os
import signal
from functools import partial

import pytest
import torch

from tucker_cam.errors import BadFileError
from tucker_cam.pictures.ahead import in_batches, read_ahead

BATCHES = [[index, index + 1] for index in range(0, 40, 2)]


def noted(batch, folder):
    (folder / str(batch[0])).touch()
    return sum(batch)


def fails(batch, error):
    raise error("of the reader")


def is_killed(batch):
    os.kill(os.getpid(), signal.SIGKILL)


# Two batches wait for each process, and one more is asked for when one is taken.
@pytest.mark.parametrize(("workers", "most"), [(0, 1), (2, 5), (None, len(BATCHES))])
def test_what_is_read_comes_in_the_order_of_the_batches_a_few_ahead_and_draws_no_random_number(workers, most, tmp_path):
    state = torch.get_rng_state()
    read = read_ahead(BATCHES, partial(noted, folder=tmp_path), workers)
    first = next(read)
    assert 1 <= len(list(tmp_path.iterdir())) <= most
    assert [first, *read] == [sum(batch) for batch in BATCHES]
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("error", [ZeroDivisionError, RuntimeError])
def test_an_error_of_the_reader_comes_through_as_it_is(workers, error):
    with pytest.raises(error, match="of the reader"):
        list(read_ahead(BATCHES, partial(fails, error=error), workers))


def test_the_callers_default_device_plays_no_part():
    with torch.device("meta"):
        assert [*read_ahead(BATCHES, sum, 1)] == [*map(sum, BATCHES)]


def test_what_cannot_be_sent_to_a_process_is_read_in_this_one(monkeypatch, caplog):
    monkeypatch.setattr("multiprocessing.get_start_method", lambda: "spawn")
    here = []
    assert [*read_ahead(BATCHES, lambda batch: here.append(batch) or sum(batch), 2)] == [sum(each) for each in here]
    assert here == BATCHES
    assert "cannot be pickled" in caplog.text


def test_a_process_that_is_killed_is_an_error_that_says_what_to_do():
    with pytest.raises(BadFileError, match="killed, perhaps for lack of memory: workers=0"):
        list(read_ahead(BATCHES, is_killed, 1))


def test_batches_are_of_one_size_but_the_last():
    assert in_batches(range(5), 2) == [range(2), range(2, 4), range(4, 5)]
    assert in_batches([], 2) == []
