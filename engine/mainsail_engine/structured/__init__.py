"""Structured output: what an answer must look like, and how that is enforced token by token.

    API process     grammar.py, json_schema.py     request → Grammar (checked for form, size and enforceability)
    core process    compiler.py ─▶ worker.py        Grammar → compiled, in a process that may hang or crash alone
                    constraint.py                   one request's place in its grammar: accept, what is forced
                    masks.py                        which tokens may come next, for all rows of a step
                    jump_forward.py                 a forced text as tokens

The automaton and its masks are xgrammar's (Dong et al., 2024). Nothing here imports torch.
"""
