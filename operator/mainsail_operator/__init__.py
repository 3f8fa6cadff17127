"""The operator: from InferenceServices to pods that serve.

In the order in which an object flows::

    types/        spec and status as typed models; crd.py makes the CustomResourceDefinition of them
    handlers.py   kopf: watches and indexes, wake-ups
    reconcile.py  one task per object; a pass is observe → plan → apply → status
    observe.py    what is there, and why a pod does not serve
    objects.py    pure builders: spec → Deployment, Service, ServiceAccount
    plan.py       pure: what to do next, each action with its reason
    status.py     pure: conditions, kstatus-clean
    apply.py      the only writer; every write is fenced by lease.py
"""
