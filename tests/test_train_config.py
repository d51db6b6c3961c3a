"""What a training configuration refuses, and the batches of rows in memory."""

import pytest
import torch

from fastsae import (
    CheckpointConfig,
    LogConfig,
    OptimizerConfig,
    ScheduleConfig,
)
from fastsae.data.batches import ShuffledRows
from training_runs import config


class TestShuffledRows:
    def test_an_epoch_visits_every_row_once(self):
        batches = ShuffledRows(torch.arange(90.0)[:, None], 10, seed=5)
        seen = torch.cat([batches.batch(step) for step in range(9)]).flatten()
        assert seen.sort().values.tolist() == list(range(90))
        assert seen.tolist() != list(range(90))

    def test_the_end_of_an_epoch_is_filled_from_the_next(self):
        batches = ShuffledRows(torch.arange(25.0)[:, None], 10, seed=5)
        seen = torch.cat([batches.batch(step) for step in range(5)]).flatten()
        first, second = seen[:25].tolist(), seen[25:].tolist()
        assert sorted(first) == sorted(second) == list(range(25))
        assert first != second

    def test_a_batch_is_a_function_of_seed_and_step_alone(self):
        rows = torch.arange(25.0)[:, None]
        in_order = [ShuffledRows(rows, 10, seed=5).batch(step) for step in range(8)]
        batches = ShuffledRows(rows, 10, seed=5)
        for step in (7, 0, 3, 3, 6):
            assert torch.equal(batches.batch(step), in_order[step])
        iterator = batches.from_step(4)
        assert all(torch.equal(next(iterator), in_order[step]) for step in (4, 5, 6))
        assert not torch.equal(ShuffledRows(rows, 10, seed=6).batch(0), in_order[0])

    @pytest.mark.parametrize("batch_size", [0, 26])
    def test_a_batch_size_out_of_range_is_refused(self, batch_size):
        with pytest.raises(
            ValueError, match=r"batch_size must be in \[1, N\] with N = 25 rows, got"
        ):
            ShuffledRows(torch.zeros(25, 2), batch_size)


BAD_RUNS = {
    "total_tokens must be at least 1, got 0": {"data": {"total_tokens": 0}},
    "batch_size must be at least 1 or None, got 0": {"data": {"batch_size": 0}},
    "dead_window must be at least 1 or None, got -1": {"dead_window": -1},
    "compute_dtype must name a floating torch dtype, got 'half8'": {
        "data": {"compute_dtype": "half8"}
    },
}


@pytest.mark.parametrize("message", BAD_RUNS)
def test_config_is_refused(message):
    with pytest.raises(ValueError) as caught:
        config(**BAD_RUNS[message])
    assert str(caught.value) == message


@pytest.mark.parametrize(
    "part, message",
    [
        (lambda: LogConfig(every=0), "log.every must be at least 1, got 0"),
        (lambda: CheckpointConfig(keep=0), "checkpoint.keep must be at least 1, got 0"),
        (
            lambda: CheckpointConfig(every=0),
            "checkpoint.every must be at least 1 or None, got 0",
        ),
        (
            lambda: ScheduleConfig(warm_up_steps=-1),
            "warm_up_steps must be at least 0 or None, got -1",
        ),
    ],
)
def test_a_part_is_refused(part, message):
    with pytest.raises(ValueError, match=message):
        part()


@pytest.mark.parametrize("field, value", [("lr", 0.0), ("lr", -1.0), ("clip_norm", 0.0)])
def test_optimizer_config_is_refused(field, value):
    with pytest.raises(ValueError, match=f"{field} must be above 0.*, got {value}"):
        OptimizerConfig(**{field: value})


def test_steps_of_an_unresolved_run_are_refused():
    with pytest.raises(ValueError, match="batch_size must be resolved before total_steps"):
        _ = config(data={"batch_size": None}).total_steps
