"""The API process: HTTP in, tokens through the core, text out. See CONTRIBUTING.md for the map."""
