"""Sweeps: recipes x sparsities x seeds x tasks, every trial an ordinary run folder, every recipe with the same teacher.

    OUT/<task>/teacher-seed<n>/               one teacher for each task and seed, fine-tuned once
    OUT/<task>/<recipe>-<sparsity>-seed<n>/   a trial: a run whose given teacher is that one
    OUT/sweep.json  sweep.md                  all rows, and their averages

`trials.py` plans the trials and `run_sweep.py` runs them. A finished stage is skipped and a killed
one resumes, so that the same command goes on with a sweep. `run_trial` is a function of its trial
alone, and of the folder; `on_ray.py` has Ray run many at once, on machines that see the folder.
"""
