"""The stages of a run in their order.

| stage | reads | writes |
|---|---|---|
| teacher | rows | the dense model, fine-tuned on the task |
| prune | teacher | phase 1: the first sparse student |
| distill | prune, teacher | phase 2: the student, distilled further |
| finetune | distill, teacher | phase 3: the final student |
| export | teacher, finetune | both for every target, each checked against its checkpoint, and the bundle |
| bench | export, teacher | student against dense teacher, timed side by side |

`run_stages.py` runs them, and `api.py` has what Python calls: `compress` and `export_model`.
Importing these two is cheap: a stage, and torch with it, is imported when it runs.
"""
