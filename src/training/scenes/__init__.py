"""Generated scenes: the data of the quick start, the tests and the benchmarks."""
