"""The zoo's models as Transformers classes: after `import zoo.hf` its Auto classes open what `tools.export` wrote.

import zoo.hf
from transformers import AutoModelForCausalLM, AutoProcessor

model, processor = (cls.from_pretrained("exported") for cls in (AutoModelForCausalLM, AutoProcessor))
inputs = processor([["seven"], ["two"]])
rows = processor.batch_parts(model.generate(**inputs))
"""

from zoo.extras import extra

with extra("hf", "zoo.hf"):
    import transformers

from zoo.hf.cache import ZooCache
from zoo.hf.config import ZooConfig
from zoo.hf.model import ZooForCausalLM
from zoo.hf.processor import ZooProcessor

transformers.AutoConfig.register(ZooConfig.model_type, ZooConfig, exist_ok=True)
transformers.AutoModelForCausalLM.register(ZooConfig, ZooForCausalLM, exist_ok=True)
transformers.AutoProcessor.register(ZooConfig, ZooProcessor, exist_ok=True)

__all__ = ["ZooCache", "ZooConfig", "ZooForCausalLM", "ZooProcessor"]
