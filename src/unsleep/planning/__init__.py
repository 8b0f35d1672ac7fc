"""Planning: the memory, time and cost of a task on a GPU, from a model's config alone."""
