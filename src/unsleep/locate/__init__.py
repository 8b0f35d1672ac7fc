"""What in the activations carries a behaviour: features, directions, differences, patches, subspaces."""
