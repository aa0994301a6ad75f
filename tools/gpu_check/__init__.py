"""Everything that only a CUDA device can say about this project, in one timed command."""
