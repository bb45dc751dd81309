"""``python -m trainer COMMAND ...``: the same as ``python -m trainer.COMMAND ...``."""

import sys

from trainer.cli.main import TRAINER, main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], "python -m trainer", TRAINER))
