"""What every executor must do. Subclass once per executor, say how to make one and what to feed it."""

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from inferbus.models.base import Executor, Tensors
from inferbus.models.warmup import warm_up_input


def equal(left: Tensors, right: Tensors) -> bool:
    return left.keys() == right.keys() and all(
        np.array_equal(left[name], right[name])
        if left[name].dtype.kind in "OUbiu"
        else np.allclose(left[name], right[name], rtol=1e-4, atol=1e-6)
        for name in left
    )


def taken(columns: Tensors, rows: "slice | np.ndarray[tuple[int], np.dtype[np.int64]]") -> Tensors:
    return {name: np.ascontiguousarray(column[rows]) for name, column in columns.items()}


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class ExecutorContract:
    """The promises of `Executor`, tried on `make`'s."""

    def make(self, folder: Path) -> Executor:
        """A new executor whose files may lie in `folder`; not loaded."""
        raise NotImplementedError

    def inputs(self, rows: int) -> Tensors:
        """A valid batch of `rows` different rows."""
        raise NotImplementedError

    def bad(self, rows: int) -> Tensors:
        """A batch that makes `predict` raise."""
        raise NotImplementedError

    @pytest.fixture
    def executor(self, tmp_path: Path) -> Iterator[Executor]:
        executor = self.make(tmp_path)
        executor.load()
        yield executor
        executor.close()

    @pytest.mark.parametrize("rows", [1, 2, 3, 7, 31, 257])
    def test_as_many_rows_come_out_as_went_in_and_as_the_signature_says(self, executor: Executor, rows: int) -> None:
        outputs = executor.predict(self.inputs(rows))
        assert list(outputs) == [spec.name for spec in executor.signature.outputs]
        for spec in executor.signature.outputs:
            array = outputs[spec.name]
            assert array.dtype == spec.dtype
            assert len(array) == rows
            assert all(e in (-1, s) for e, s in zip(spec.shape, array.shape, strict=True))

    def test_rows_come_out_in_the_order_they_went_in(self, executor: Executor) -> None:
        inputs, order = self.inputs(16), np.random.default_rng(1).permutation(16)
        shuffled = executor.predict(taken(inputs, order))
        assert equal(shuffled, taken(executor.predict(inputs), order))

    def test_a_row_alone_is_answered_as_in_company(self, executor: Executor) -> None:
        inputs = self.inputs(9)
        together = executor.predict(inputs)
        for row in range(9):
            one = slice(row, row + 1)
            assert equal(executor.predict(taken(inputs, one)), taken(together, one))

    def test_an_error_leaves_the_executor_usable(self, executor: Executor) -> None:
        inputs = self.inputs(4)
        before = executor.predict(inputs)
        for _ in range(3):
            with pytest.raises(Exception, match=r"."):
                executor.predict(self.bad(4))
        assert equal(executor.predict(inputs), before)

    def test_inputs_are_left_as_they_were(self, executor: Executor) -> None:
        inputs = self.inputs(5)
        copies = {name: column.copy() for name, column in inputs.items()}
        executor.predict(inputs)
        assert equal(inputs, copies)

    def test_outputs_are_kept_when_the_next_batch_runs(self, executor: Executor) -> None:
        inputs = self.inputs(12)
        first = executor.predict(taken(inputs, slice(0, 6)))
        copies = {name: column.copy() for name, column in first.items()}
        executor.predict(taken(inputs, slice(6, 12)))
        assert equal(first, copies)
        executor.close()
        assert equal(first, copies)

    def test_loading_and_closing_twice_changes_nothing(self, tmp_path: Path) -> None:
        executor, inputs = self.make(tmp_path), self.inputs(4)
        executor.close()
        answers = []
        for _ in range(2):
            executor.load()
            executor.load()
            answers.append(executor.predict(inputs))
            executor.close()
            executor.close()
        assert equal(answers[0], answers[1])

    def test_an_executor_of_any_thread_answers_on_every_thread_alike(self, executor: Executor) -> None:
        if not executor.any_thread:
            return  # the pipeline asks it on the thread that loaded it only
        inputs, answers = self.inputs(9), []
        for _ in range(3):
            thread = threading.Thread(target=lambda: answers.append(executor.predict(inputs)))
            thread.start()
            thread.join()
        assert len(answers) == 3
        assert all(equal(answer, executor.predict(inputs)) for answer in answers)

    def test_predicting_before_loading_is_an_error(self, tmp_path: Path) -> None:
        with pytest.raises(RuntimeError, match="before load"):
            self.make(tmp_path).predict(self.inputs(1))

    def test_the_warm_up_input_is_answered(self, executor: Executor) -> None:
        outputs = executor.predict(warm_up_input(executor.signature, 32))
        assert {len(array) for array in outputs.values()} == {32}

    @pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="no /proc to read resident memory from")
    def test_memory_stays_flat_over_many_batches(self, executor: Executor) -> None:
        batches = [self.inputs(rows) for rows in (1, 17, 256)]
        for _ in range(100):  # fill the allocators' pools first
            for inputs in batches:
                executor.predict(inputs)
        before = resident_bytes()
        for _ in range(1000):
            for inputs in batches:
                executor.predict(inputs)
        # A kept batch of 256 rows would be 1,000 x 10 KiB here.
        assert resident_bytes() - before < 3 * 2**20
