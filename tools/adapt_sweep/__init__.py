"""A sweep over ways to make one multimodal LLM cheaper, matched by decoder FLOPs; `python -m tools.adapt_sweep`."""
