"""Common parts of the trainers: data, models, the loop, optimizers, configuration, results and plots."""
