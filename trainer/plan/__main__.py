"""``python -m trainer.plan RECIPE``"""

from trainer.core.settings import run_verb
from trainer.plan.command import main

if __name__ == "__main__":
    run_verb(main)
