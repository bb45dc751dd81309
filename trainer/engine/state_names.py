"""What is kept of a trained parameter beside the optimizer's own moments, by its name in a checkpoint. Imports nothing:
DeepSpeed takes seconds, and evaluating or exporting does without.
"""

WEIGHT = "weight"
AVERAGE = "ema"
"""The running average of the weights (``OptimSettings.ema``)."""
