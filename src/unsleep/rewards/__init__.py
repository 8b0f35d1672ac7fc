"""Rewards: the protocol and its adapters, and the dictionary features that are correlated with reward."""
