"""Models: what one is (architecture.py), what a checkpoint says of it (checkpoint_config.py), its tensors (loader.py),
and one file per family."""
