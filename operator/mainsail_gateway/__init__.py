"""The front door: one OpenAI-compatible endpoint for every InferenceService of a cluster.

A request's way through the modules, which is also the order to read them in::

    server.py    listens, limits what a connection may do, drains on SIGTERM
    app.py       the ASGI application: paths, bodies, errors
    request.py   what the gateway reads of a body: the model, and what a prompt weighs
    routes.py    model -> service -> endpoints, from watches (watch.py)
    auth.py      whose request it is, and what its key allows (pure); keys.py watches the Secrets, usage.py reads what
                 an answer has used
    virtual.py   a name that stands for several services (pure); chain.py asks them, attempt.py keeps failed tries from
                 the client, schema.py says what failed, external.py goes out
    shed.py      now, later, or not (pure), with what gradient.py learned and room.py heard; admission.py waits and
                 refuses, hold.py tells waiting clients and wakes a service at zero
    sessions.py  whether a conversation's turn is held, and where it belongs (pure); turns.py waits
    split.py     which revision (pure)
    balance.py   which endpoint of it (pure), with fleet.py as the memory of both; kv_index.py knows what is cached
                 where (pure), as kv_events.py hears it
    retry.py     whether once more (pure)
    relay.py     bytes through, both ways; over connections of upstream.py

With `--workers`, crew.py starts several such processes (worker.py) behind one port, merge.py shows them as one, and
sharing.py lets the limits of keys hold for all of them.

Beside them: record.py (access log, traces), debug.py (why an endpoint would be picked), errors.py (OpenAI's error
form), metrics.py and pod_metrics.py, health.py (own port and thread), settings.py. Decisions are pure functions that
take the clock as an argument; sockets are only in server, upstream and watch.
"""
