"""The recipe and the order of the stages: fields.py has every setting, with its sections in
training.py and delivery.py; reading.py finds a recipe.

The names of the stages stand here: the command line's help needs them, and must not wait for pydantic.
"""

PHASES = ("prune", "distill", "finetune")  # of the student
TRAINING = ("teacher", *PHASES)
STAGES = (*TRAINING, "export", "bench")
