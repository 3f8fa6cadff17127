"""Text to token ids and back: tokenizers, chat templates, incremental detokenizing, stop strings.

Runs in the API process: no torch, no transformers. Token ids are the only thing that crosses to the core.
"""
