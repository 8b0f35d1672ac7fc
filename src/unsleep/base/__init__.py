"""What every room stands on: artefacts on disk, statistics, this machine, the hub."""
