"""Prompt caches as files: a strict safetensors container, and what quantcache puts into it."""
