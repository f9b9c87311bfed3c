"""Checkpoints on disk: safetensors headers and byte ranges, folder layouts, students written whole or not at all."""
