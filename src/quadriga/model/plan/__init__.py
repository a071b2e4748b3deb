"""What a model needs of a cluster or a box, by arithmetic: memory, time, cost, mesh, serving. No torch."""
