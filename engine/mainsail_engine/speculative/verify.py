"""What a step's tokens say about the guesses that were verified in it."""

from __future__ import annotations

from collections.abc import Sequence


def right_guesses(guesses: Sequence[int], tokens: Sequence[int]) -> int:
    """How many guesses stand: those before the first that is not the token sampled in its place.

    tokens: one more than guesses; tokens[i] was sampled after guesses[:i], so those up to the first difference, and
    that one itself, are what the model generates.
    """
    if tokens[: len(guesses)] == guesses:
        return len(guesses)
    count = 0
    while count < len(guesses) and tokens[count] == guesses[count]:
        count += 1
    return count


def verified_tokens(tokens: Sequence[int], num_right: int) -> list[int]:
    """The request's next tokens, at least one, where so many guesses were right.

    A failed row's code (below 0) counts only where it is the first.
    """
    taken = list(tokens[: num_right + 1])
    return taken[:-1] if taken[-1] < 0 and len(taken) > 1 else taken
