"""The proof on a GPU: one script, at most eight minutes on one card, a line for each claim and its criterion.

    bash tests/gpu/run.sh [--out FILE.json] [--only TEXT] [--seconds 480]     # on a machine with a GPU
    bash tests/gpu/run.sh --dry                                              # the same lines at toy sizes on the CPU

A section is a process of its own, so that a crash costs its remaining lines and nothing else. Sections run in order of
what they tell for their time; the run goes on after a failure and exits with 1 if there was one.
"""
