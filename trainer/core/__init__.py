"""What all layers stand on: types, settings, process group, small collectives, messages."""

from trainer.core.logs import to_the_terminal

to_the_terminal()
