"""What ``python -m trainer.plan`` knows: a trace of the model under fake tensors, where ZeRO keeps what, how fast cards
are."""
