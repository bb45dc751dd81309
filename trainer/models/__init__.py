"""Models: Hugging Face's dual encoders, with the interface that training needs.

model = trainer.models.build(ModelSettings(path="openai/clip-vit-base-patch32"))
z = model(pixels, tokens, token_mask)          # Embeddings(image [b, d], text [b, d], scale [1], bias [1])
model.save_pretrained("export")                # AutoModel.from_pretrained("export") loads it
"""

from trainer.models.dual_encoder import DualEncoder, Head, build, build_to_load
from trainer.models.settings import ModelSettings

__all__ = ["DualEncoder", "Head", "ModelSettings", "build", "build_to_load"]
