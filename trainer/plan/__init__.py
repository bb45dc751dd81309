"""The planner (``python -m trainer.plan``): a trace of the model under fake tensors, a model of ZeRO's memory, a
roofline of cards."""
