"""Where rows come from and in which order they are read. Knows nothing of tasks or models.

sources    data sets on disk as splits of rows: JSON lines, tensorflow-datasets, Hugging Face datasets
stream     endless shuffled batches of a split: a pure function of (seed, step), shared out to processes
"""

from distill_jax.data.sources import DataError, RowSource, open_dataset
from distill_jax.data.stream import ExampleStream

__all__ = ["DataError", "ExampleStream", "RowSource", "open_dataset"]
