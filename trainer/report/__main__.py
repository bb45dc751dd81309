"""``python -m trainer.report RUN``"""

from trainer.core.settings import run_verb
from trainer.report import main

if __name__ == "__main__":
    run_verb(main)
