"""See the package map in CONTRIBUTING.md."""
