"""Brings a model's files from where they are kept to a folder: hf://, s3:// and oci://, with progress and reasons.

The operator runs it as a Job that fills a shared cache, as a DaemonSet that keeps copies on nodes, and as an init
container where neither is asked for. `source` says what a URI means, `place` owns the folder (one writer, nothing half
there), `hub`, `s3` and `oci` each know one kind of store, `progress` tells how far it is, `cli` puts them together.
"""
