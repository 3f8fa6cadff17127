"""The front door: one OpenAI-compatible endpoint for every InferenceService of a cluster.

A request's way through the modules, which is also the order to read them in::

    server.py    listens, drains on SIGTERM
    app.py       the ASGI application: paths, bodies, errors
    request.py   what the gateway reads of a body: the model, and what a prompt weighs
    routes.py    model -> service -> endpoints, from watches (watch.py)
    balance.py   which endpoint (pure)
    relay.py     bytes through, both ways; another replica while no byte of an answer has come

Beside them: errors.py (OpenAI's error form), metrics.py, health.py (own port and thread), settings.py.
Decisions are pure functions; sockets are only in server, relay and watch.
"""
