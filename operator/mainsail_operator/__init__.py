"""The operator: from InferenceServices to pods that serve.

In the order in which an object flows::

    types/        spec and status as typed models; crd.py makes the CustomResourceDefinition of them
    handlers.py   kopf: watches fill the store and wake; store.py, relist.py: kept true whatever a watch loses
    memory.py     what only a list of everything needed goes back to the system
    reconcile.py  one task per object; a pass is observe → decide → status → plan → apply
    observe.py    what is there, and why a pod does not serve
    signals.py    what pods and gateways say about their load, in windows; scrape.py, exposition.py: from where
    gate.py       pure: whether a new revision is good, by what its pods showed
    rollout.py    pure: the rollout's state machine; capacity.py: replicas and shares of the requests
    objects.py    pure builders: spec → Deployment, Service, ServiceAccount, …
    plan.py       pure: what to do next, each action with its reason
    status.py     pure: conditions, kstatus-clean; events.py: what is told once
    apply.py      the only writer; every write is fenced by lease.py
"""
