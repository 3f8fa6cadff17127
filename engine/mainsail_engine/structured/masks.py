"""Which tokens may come next, for the constrained rows of one step: one bit for each token, 1 for allowed.

All masks of a step are filled in one call, by several threads where there are many, while the device computes the
step's forward pass (core.py says when). A mask takes microseconds; a grammar may still turn out slow late in a text,
beyond what the compiler tried. Then the rows of the next steps are filled one at a time until the slow one is known,
and its request fails alone. So does one whose mask cannot be filled at all.
"""

from __future__ import annotations

import logging
import os
import time
from dataclasses import dataclass

import numpy as np

from mainsail_engine.request import Request
from mainsail_engine.step import StepPlan
from mainsail_engine.structured import bindings
from mainsail_engine.structured.constraint import Constraint

log = logging.getLogger(__name__)
ROWS_PER_THREAD = 64
MAX_THREADS = 8
SLOW_STEP_S = 0.1
"""All masks of a step. Beyond it, the rows are looked at one by one."""
SLOW_ROW_S = 0.05
MAX_SLOW_FILLS = 3
ALL_ALLOWED = -1
"""A mask word with every bit set."""
TOO_SLOW = "the grammar is too ambiguous: its masks take too long"
FAILED = "the grammar failed: it could not tell which tokens may come next"


@dataclass(frozen=True, slots=True)
class Row:
    index: int
    """Among the rows that the step samples."""
    request: Request
    constraint: Constraint
    no_stop: tuple[int, ...] = ()
    """Stop tokens that are not allowed yet (min_tokens)."""
    after: tuple[int, ...] = ()
    """Guesses that come before this row's token, and conform."""


def constrained_rows(plan: StepPlan) -> list[Row]:
    """The rows whose next token the grammar has a say in.

    Not those of requests that have ended since the step was launched, nor those whose next token is known already: a
    jump forward has left the step's sample without a use.
    """
    rows: list[Row] = []
    index = 0
    for chunk in plan.chunks:
        if not chunk.samples:
            continue
        first, index = index, index + 1 + len(chunk.guesses)
        request = chunk.request
        constraint = request.constraint
        if constraint is None or request.is_finished or not request.num_in_flight:
            continue
        for ahead in range(1 + len(chunk.guesses)):
            early = len(request.output_token_ids) + ahead < request.params.min_tokens
            no_stop = constraint.stop_token_ids if early else ()
            rows.append(Row(first + ahead, request, constraint, no_stop, tuple(chunk.guesses[:ahead])))
    return rows


class MaskFiller:
    def __init__(self, num_threads: int | None = None) -> None:
        threads = num_threads or min(MAX_THREADS, max(1, len(os.sched_getaffinity(0)) // 2))
        self._alone = bindings.batch_matcher(1)
        self._together = bindings.batch_matcher(threads) if threads > 1 else self._alone
        self._suspicious = False

    def fill(self, rows: list[Row], masks: np.ndarray) -> list[tuple[Row, str]]:
        """Write each row's mask: masks is [len(rows), words] int32. Returns the rows that cannot go on, and why."""
        started = time.perf_counter()
        lost = self._one_by_one(rows, masks) if self._suspicious or not self._all_at_once(rows, masks) else []
        self._suspicious = time.perf_counter() - started > SLOW_STEP_S
        for place, row in enumerate(rows):
            if row.no_stop:
                _forbid(masks[place], row.no_stop)
        return lost

    def _all_at_once(self, rows: list[Row], masks: np.ndarray) -> bool:
        """In one call those rows whose request stands where its tokens end; then those that come after guesses.

        False: one of them failed, and nobody knows which.
        """
        places = [place for place, row in enumerate(rows) if not row.after]
        batch = self._together if len(places) >= ROWS_PER_THREAD else self._alone
        matchers = [rows[place].constraint.matcher for place in places]
        try:
            batch.batch_fill_next_token_bitmask(matchers, masks, None if len(places) == len(rows) else places, False)
            for place, row in enumerate(rows):
                if row.after:
                    _fill_after(row, masks, place)
        except Exception:
            log.exception("the masks of %d rows failed; they are filled one by one", len(rows))
            return False
        return True

    def _one_by_one(self, rows: list[Row], masks: np.ndarray) -> list[tuple[Row, str]]:
        lost: list[tuple[Row, str]] = []
        for place, row in enumerate(rows):
            started = time.thread_time()
            try:
                _fill_after(row, masks, place)
            except Exception:
                log.exception("the mask of request %s failed", row.request.request_id)
                masks[place] = ALL_ALLOWED
                lost.append((row, FAILED))
                continue
            if time.thread_time() - started > SLOW_ROW_S:
                row.constraint.slow_fills += 1
                if row.constraint.slow_fills >= MAX_SLOW_FILLS:
                    lost.append((row, TOO_SLOW))
        return lost


def _fill_after(row: Row, masks: np.ndarray, place: int) -> None:
    """The row's mask where its guesses have been accepted, for as long as it takes."""
    matcher, accepted = row.constraint.matcher, 0
    try:
        for token in row.after:
            if not matcher.accept_token(token, False):
                raise RuntimeError("a guess was planned that the grammar does not allow")
            accepted += 1
        matcher.fill_next_token_bitmask(masks, place, False)
    finally:
        if accepted:
            matcher.rollback(accepted)


def _forbid(mask: np.ndarray, tokens: tuple[int, ...]) -> None:
    """Clear these tokens' bits, unless nothing would be left: a complete text must end."""
    kept = mask.copy()
    words = kept.view(np.uint32)
    for token in tokens:
        words[token >> 5] &= np.uint32(0xFFFFFFFF ^ (1 << (token & 31)))
    if kept.any():
        mask[:] = kept
