"""Programs that measure speed and memory: ``python -m benchmarks.NAME`` from the repository's root."""
