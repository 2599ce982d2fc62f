"""Decoders, adapters, and their files. The only place that imports Flax."""
