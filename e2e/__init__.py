"""End to end: a real Kubernetes on one machine, the product on it through its chart, real traffic.

`cluster/` is the rig (control plane and node as plain processes); `up.py` is what `make up` runs and `down.py` what
`make down` runs; the tests beside them use the very same code through `conftest.py`. Everything that runs before the
virtual environment exists (all but the tests) is the standard library only.
"""
