"""Sweeps over ways to make one multimodal LLM cheaper, matched by decoder FLOPs: `type: adapt`."""
