"""``python -m trainer.search MODEL SHARDS``"""

import sys

from data_tools.io.errors import run_command
from trainer.search import main

if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
