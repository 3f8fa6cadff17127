"""The runner: a step's plan as tensors (batch.py), and the forward pass over them (model_runner.py)."""
