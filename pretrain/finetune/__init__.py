"""Fine-tuning of multimodal LLMs, made sparse or as they are; `python -m pretrain.finetune RECIPE.yaml`."""
