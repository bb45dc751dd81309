"""RingLIP: train CLIP and SigLIP at the batch you want on the GPUs you have.

deepspeed --module trainer.train trainer/recipes/glyphs.yaml
"""

__version__ = "0.1.0"
