"""Models: what a checkout says (architecture.py), its tensors (loader.py), and one file per family."""
