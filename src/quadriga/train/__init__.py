"""Training: batches, objectives, optimisers, the loop, its state on disk, and many ranks.

    source.rows(step, ...) ─► Batch ─► Objective(model, batch) ─► backward ─► clip ─► optimiser ─► state.save

Nothing here serves requests, and ``engine`` never imports it: the two meet in checkpoints.
"""
