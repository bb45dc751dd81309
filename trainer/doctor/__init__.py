"""Checks every node before a run: ``python -m trainer.doctor [--hostfile F]``."""
