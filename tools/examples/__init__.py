"""Commands that make demonstration data and models, and judge what was learned from them.

* `make_digits`: handwritten digits with their names, as shards; `evaluate_digits` judges a run trained on them.
* `evaluate_drawings` judges a run trained on captioned drawings.
* `make_digit_grids`, `make_captions`: questions about pictures, for fine-tuning.
* `make_llava`, `pretrain_tower`: a small LLaVA to be fine-tuned on them.
"""
