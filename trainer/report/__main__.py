"""``python -m trainer.report RUN``"""

from trainer.report import main
from trainer.settings import run_verb

if __name__ == "__main__":
    run_verb(main)
