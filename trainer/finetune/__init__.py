"""``python -m trainer.finetune``: see __main__.py."""
