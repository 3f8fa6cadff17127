"""Speculative decoding: guess the next tokens cheaply, verify them together in one step.

    source (ngram.py, draft_model.py) ──guesses──▶ speculator.py ──how many of each, or none (policy.py)──▶ scheduler
    one row for each guess and one more ──forward, sample──▶ tokens ──the right ones and one more (verify.py)──▶ request

A row's token is sampled as it would be without guesses: from the model's distribution after the tokens before it, with
the random number of its seed and position. A guess is right if that is the token. So what a request generates is what
it generates without speculation, greedy or seeded, token for token; and since a guess x is right with probability
p(x), and what is taken in its place otherwise is distributed as p without x, this is speculative sampling (Leviathan
et al., 2023; Chen et al., 2023) for guesses that are fixed before the draw.
"""
