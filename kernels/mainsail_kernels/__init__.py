"""The map of the code is in docs/architecture.md."""
