"""The KV cache's bookkeeping: who owns a block, what is shared, what may go. No tensors here."""
