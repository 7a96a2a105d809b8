"""The gap tracker: what may be committed, and what a crash would repeat."""

from __future__ import annotations

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from inferbus.connectors.gaps import Gaps


class GapsMachine(RuleBasedStateMachine):
    """Chunks with holes arrive, settle in any order, positions are confirmed late: never past what is open."""

    def __init__(self) -> None:
        super().__init__()
        self.gaps = Gaps()
        self.received: dict[int, int] = {}
        self.settled: set[int] = set()
        self.next = 0
        self.confirmed: int | None = None
        self.chunks: list[tuple[list[int], int]] = []

    @rule(holes=st.lists(st.integers(1, 4), min_size=1, max_size=6), size=st.integers(0, 1000))
    def receive(self, holes: list[int], size: int) -> None:
        receipts = []
        for hole in holes:
            self.next += hole
            receipts.append(self.next)
        self.gaps.receive(receipts, size)
        self.chunks.append((receipts, size))
        self.received.update(dict.fromkeys(receipts, size))
        if self.confirmed is None:
            self.confirmed = receipts[0]

    @precondition(lambda self: len(self.settled) < len(self.received))
    @rule(choice=st.data())
    def settle_some(self, choice: st.DataObject) -> None:
        still_open = sorted(set(self.received) - self.settled)
        chosen = choice.draw(st.lists(st.sampled_from(still_open), unique=True, min_size=1))
        self.gaps.settle(chosen)
        self.settled.update(chosen)

    @rule(receipts=st.lists(st.integers(-5, 500)))
    def settling_what_was_never_received_changes_nothing(self, receipts: list[int]) -> None:
        self.gaps.settle([r for r in receipts if r not in self.received or r in self.settled])

    @rule()
    def confirm(self) -> None:
        position = self.gaps.unconfirmed()
        if position is not None:
            self.gaps.confirm(position)
            self.confirmed = position

    @invariant()
    def the_position_is_the_first_open_receipt_or_one_past_the_highest(self) -> None:
        still_open = set(self.received) - self.settled
        if still_open:
            assert self.gaps.position == min(still_open)
        elif self.received:
            assert self.gaps.position == max(self.received) + 1
        else:
            assert self.gaps.position is None
        assert self.gaps.idle() is (not still_open)

    @invariant()
    def in_flight_is_never_less_than_what_a_crash_would_repeat(self) -> None:
        exact = sum(1 for r in self.received if self.confirmed is None or r >= self.confirmed)
        assert self.gaps.inflight_messages >= exact
        whole = [(r, s) for r, s in self.chunks if self.confirmed is None or r[-1] >= self.confirmed]
        assert self.gaps.inflight_messages == sum(len(r) for r, _ in whole)
        assert self.gaps.inflight_bytes == sum(s for _, s in whole)

    @invariant()
    def there_is_something_to_confirm_exactly_when_the_prefix_grew(self) -> None:
        expected = self.gaps.position
        if expected is not None and self.confirmed is not None and expected > self.confirmed:
            assert self.gaps.unconfirmed() == expected
        else:
            assert self.gaps.unconfirmed() is None


TestGaps = GapsMachine.TestCase


def test_a_stale_chunk_is_refused_instead_of_letting_the_position_pass_it() -> None:
    gaps = Gaps()
    gaps.receive([100, 101], 20)
    with pytest.raises(ValueError, match="receipt 95 came after 101"):
        gaps.receive([95, 96], 20)


def test_a_fresh_epoch_confirms_nothing_below_its_first_receipt() -> None:
    gaps = Gaps()
    gaps.receive([7, 8], 2)
    assert gaps.unconfirmed() is None
    gaps.settle([7])
    assert gaps.unconfirmed() == 8
