"""``python -m trainer.study``: see __main__.py."""
