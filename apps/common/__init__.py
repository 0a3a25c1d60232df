"""What the trainers share: data, models, the loop, optimizers, configuration, results and plots."""
