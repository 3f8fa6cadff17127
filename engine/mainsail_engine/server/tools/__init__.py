"""Tool calls: how models write them, read as they come. Pure; no torch."""
