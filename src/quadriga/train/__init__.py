"""Training: batches, objectives, optimisers, the loop, checkpoints, and distributed training.

    source.rows(step, ...) ─► TrainingBatch ─► Objective(model, batch) ─► backward ─► clip ─► optimiser ─► state.save

Independent of ``engine``: neither imports the other, and they exchange models through checkpoints.
"""
